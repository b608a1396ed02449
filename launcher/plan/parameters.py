"""How many parameters a model has and what a token costs: formulas over a plain config.json, no transformers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """One shape of weight matrix or vector and how often the model holds it.

    active: the share of it that one token uses (experts: chosen / all), else 1
    """

    shape: tuple[int, ...]
    times: int = 1
    embedding: bool = False
    active: float = 1.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape) * self.times


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of one model.

    total: all parameters, a tied head counted once
    trainable: those that learn
    embedding: those of the input embedding
    flops_per_token: forward and backward of one token inside a document of `seq_len` tokens
    """

    total: int
    trainable: int
    embedding: int
    flops_per_token: float


def read_config(name: str | None, config: Config | None, revision: str | None = None) -> tuple[Config | None, str]:
    """The architecture as a dict, or None and the reason why it is not known here.

    A folder's config.json, or that of a hub model if the local hub cache holds it; nothing is downloaded.
    """
    if config is not None:
        return config, ""
    assert name is not None, "check() lets no recipe through without a name or a config"
    file = Path(name) / "config.json"
    if not file.is_file():
        found = _cached(name, revision)
        if found is None:
            return None, f"{name} is neither a folder with a config.json nor in the local hub cache"
        file = found
    return json.loads(file.read_text()), ""


def weights(config: Config) -> list[Weight] | None:
    """Every weight of the model, grouped by shape; None for a family without a formula."""
    family = config.get("model_type", "")
    if family in _FAMILIES:
        return _decoder(config, _FAMILIES[family])
    builder = _BUILDERS.get(family)
    return builder(config) if builder else None


def count(config: Config, seq_len: int) -> Parameters | None:
    """Parameters and cost of a model; None for a family without a formula.

    FLOPs: 6 a weight of the linear part (the input embedding is a look-up, a tied head is not) and 6 * layers * heads *
    head_dim * seq_len for causal attention, sliding windows not deducted (half of PaLM, arXiv:2204.02311, appendix B).
    """
    found = weights(config)
    if found is None:
        return None
    total = sum(w.elements for w in found)
    embedding = sum(w.elements for w in found if w.embedding)
    active = sum(w.elements * w.active for w in found)
    lookup = 0 if _tied(config) else embedding
    layers, width = _attention_size(config)
    return Parameters(total, total, embedding, 6.0 * (active - lookup) + 6.0 * layers * width * seq_len)


def unknown_family(config: Config) -> str:
    """What to tell about a model whose parameters no formula here counts."""
    known = ", ".join(sorted([*_FAMILIES, *_BUILDERS]))
    return f"no parameter formula for model_type {config.get('model_type')!r} (known: {known})"


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets one family of gated RMSNorm decoders apart; `defaults` are those of its config class."""

    defaults: Mapping[str, Any]
    qkv_bias: bool | None = None  # None: as attention_bias says
    out_bias: bool | None = None
    norms: int = 2  # of hidden size, in each block
    qk_norm: str = ""  # "head": one of head_dim for queries and keys; "width": over all heads at once
    fused: bool = False  # queries, keys and values in one matrix, gate and up in another


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int | None, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, **more,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
_FAMILIES: dict[str, _Family] = {
    "llama": _Family(_sizes(4096, 11008, 32, 32, None, 32000)),
    "mistral": _Family(_sizes(4096, 14336, 32, 32, 8, 32000)),
    "qwen2": _Family(_sizes(4096, 22016, 32, 32, 32, 151936), qkv_bias=True, out_bias=False),
    "qwen3": _Family(_sizes(4096, 22016, 32, 32, 32, 151936, head_dim=128), qk_norm="head"),
    "gemma": _Family(_sizes(3072, 24576, 28, 16, 16, 256000, head_dim=256, **_TIED)),
    "gemma2": _Family(_sizes(2304, 9216, 26, 8, 4, 256000, head_dim=256, **_TIED), norms=4),
    "gemma3_text": _Family(_sizes(2304, 9216, 26, 8, 4, 262208, head_dim=256, **_TIED), norms=4, qk_norm="head"),
    "phi3": _Family(_sizes(3072, 8192, 32, 32, None, 32064), fused=True),
    "olmo2": _Family(_sizes(4096, 11008, 32, 32, None, 50304), qk_norm="width"),
    "smollm3": _Family(_sizes(2048, 11008, 36, 16, 4, 128256, **_TIED)),
    "granite": _Family(_sizes(4096, 11008, 32, 32, None, 32000)),
    "mixtral": _Family(_sizes(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)),
    "qwen3_moe": _Family(
        _sizes(2048, 6144, 24, 32, 4, 151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        qk_norm="head",
    ),
}  # fmt: skip


def _with_defaults(config: Config) -> dict[str, Any]:
    family = _FAMILIES.get(config.get("model_type", ""))
    defaults = family.defaults if family else _GPT_DEFAULTS.get(config.get("model_type", ""), {})
    return {**defaults, **config}


def _tied(config: Config) -> bool:
    # the family's default where the key is absent, never the other families' False
    return bool(_with_defaults(config).get("tie_word_embeddings", False))


def _attention_size(config: Config) -> tuple[int, int]:
    """Layers, and heads * head_dim."""
    c = _with_defaults(config)
    if c["model_type"] == "gpt2":
        return c["n_layer"], c["n_embd"]
    return c["num_hidden_layers"], c["num_attention_heads"] * _head_dim(c)


def _head_dim(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def _decoder(config: Config, family: _Family) -> list[Weight]:
    c = _with_defaults(config)
    h, layers, vocab = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    found = [Weight((vocab, h), embedding=True), Weight((h,), family.norms * layers + 1)]
    if not _tied(c):
        found.append(Weight((vocab, h)))
    return found + _attention(c, family, layers) + _feed_forward(c, family, layers)


def _attention(c: Config, family: _Family, layers: int) -> list[Weight]:
    h, d = c["hidden_size"], _head_dim(c)
    queries, keys = c["num_attention_heads"] * d, (c.get("num_key_value_heads") or c["num_attention_heads"]) * d
    said = bool(c.get("attention_bias", False))
    qkv_bias = said if family.qkv_bias is None else family.qkv_bias
    out_bias = said if family.out_bias is None else family.out_bias
    rows = [(queries + 2 * keys, 1)] if family.fused else [(queries, 1), (keys, 2)]
    found = [Weight((r, h), times * layers) for r, times in rows] + [Weight((h, queries), layers)]
    if qkv_bias and not family.fused:
        found += [Weight((r,), times * layers) for r, times in rows]
    if out_bias and not family.fused:
        found.append(Weight((h,), layers))
    if family.qk_norm == "head":
        found.append(Weight((d,), 2 * layers))
    if family.qk_norm == "width":
        found += [Weight((queries,), layers), Weight((keys,), layers)]
    return found


def _feed_forward(c: Config, family: _Family, layers: int) -> list[Weight]:
    h, f = c["hidden_size"], c["intermediate_size"]
    experts = int(c.get("num_local_experts") or c.get("num_experts") or 0)
    sparse = _sparse_layers(c, layers) if experts else 0
    found = []
    if dense := layers - sparse:
        found = [Weight((2 * f, h), dense) if family.fused else Weight((f, h), 2 * dense), Weight((h, f), dense)]
        if c.get("mlp_bias", False) and not family.fused:
            found += [Weight((f,), 2 * dense), Weight((h,), dense)]
    if sparse:
        width, share = c.get("moe_intermediate_size") or f, c["num_experts_per_tok"] / experts
        found += [
            Weight((experts, h), sparse),  # the router
            Weight((experts, 2 * width, h), sparse, active=share),
            Weight((experts, h, width), sparse, active=share),
        ]
    return found


def _sparse_layers(c: Config, layers: int) -> int:
    """Blocks with experts: every `decoder_sparse_step`-th, except those that the config keeps dense."""
    every, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
    return sum(1 for i in range(layers) if i not in dense and (i + 1) % every == 0)


_GPT_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, **_TIED},
    "gpt_neox": _sizes(6144, 24576, 44, 64, None, 50432, attention_bias=True),
}


def _gpt2(config: Config) -> list[Weight]:
    c = _with_defaults(config)
    h, layers = c["n_embd"], c["n_layer"]
    f = c.get("n_inner") or 4 * h
    found = [Weight((c["vocab_size"], h), embedding=True), Weight((c["n_positions"], h)), Weight((h,), 4 * layers + 2)]
    for rows, columns in ((h, 3 * h), (h, h), (h, f), (f, h)):
        found += [Weight((rows, columns), layers), Weight((columns,), layers)]
    return found if _tied(c) else [*found, Weight((c["vocab_size"], h))]


def _gpt_neox(config: Config) -> list[Weight]:
    c = _with_defaults(config)
    h, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    found = [Weight((c["vocab_size"], h), embedding=True), Weight((h,), 4 * layers + 2)]
    said = c["attention_bias"]
    for rows, columns, bias in ((3 * h, h, said), (h, h, said), (f, h, True), (h, f, True)):
        found.append(Weight((rows, columns), layers))
        if bias:
            found.append(Weight((rows,), layers))
    return found if _tied(c) else [*found, Weight((c["vocab_size"], h))]


_BUILDERS: dict[str, Callable[[Config], list[Weight]]] = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}


def _cached(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model in the local cache (huggingface_hub: models--org--name/snapshots/COMMIT)."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    file = cache / "snapshots" / commit / "config.json" if commit else None
    return file if file and file.is_file() else None
