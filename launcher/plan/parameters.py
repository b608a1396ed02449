"""Which weights a model has: formulas over a plain config.json, no transformers; and what a token costs."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """One shape of weight matrix or vector and how often the model holds it.

    embedding: the input embedding, a look-up
    active: the share of it that one token uses (experts: chosen / all), else 1
    blocks: decoder blocks that hold it, each times / len(blocks) of them; empty: it lies outside the blocks
    layer: name of its linear layer, with {} for the number of the block; empty: it is no linear layer's matrix
    transposed: the matrix is [inputs, outputs] (GPT-2), not [outputs, inputs]
    trained: it learns
    adapter: it was put beside a frozen layer, and is fp32 whatever the model's type
    """

    shape: tuple[int, ...]
    times: int = 1
    embedding: bool = False
    active: float = 1.0
    blocks: Sequence[int] = ()
    layer: str = ""
    transposed: bool = False
    trained: bool = True
    adapter: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape) * self.times


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The lengths that activations are made of.

    queries, keys: heads x head_dim of the queries, of the keys (and of the values)
    ffn: inner width of the feed-forward layer, in a block of experts that of all experts a token uses together
    experts, all_experts: experts that a token uses, and those of a block; 0: none
    gated: the feed-forward layer multiplies two projections
    fused: queries, keys and values come out of one product
    rotary: queries and keys are turned by their position
    softcap: attention scores are capped
    norms: of hidden size in each block; norm is rms, rms32 (its result is fp32 before the weight) or layer
    qk_norm: head, width, or empty: queries and keys are not normalised
    """

    hidden: int
    layers: int
    heads: int
    queries: int
    keys: int
    ffn: int
    vocab: int
    experts: int = 0
    all_experts: int = 0
    gated: bool = True
    fused: bool = False
    rotary: bool = True
    softcap: bool = False
    norms: int = 2
    norm: str = "rms"
    qk_norm: str = ""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of one model, its adapters included.

    total: all parameters, a tied head counted once
    trainable: those that learn
    embedding: those of the input embedding
    flops_per_token: forward and backward of one token inside a document of `seq_len` tokens
    recompute_flops_per_token: what the device computes a second time beside them (model.gradient_checkpointing)
    attention_flops: of flops_per_token, what each token of its document costs a token in attention
    """

    total: int
    trainable: int
    embedding: int
    flops_per_token: float
    recompute_flops_per_token: float = 0.0
    attention_flops: float = 0.0


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
            why = f"{name} is neither a folder with a config.json nor in the local hub cache"
            return None, f"{why}. Give a folder, or fetch it: hf download {name} config.json"
        file = found
    return json.loads(file.read_text()), ""


def weights(config: Config) -> list[Weight] | None:
    """Every weight of the model, grouped by shape; None for a family without a formula."""
    family = config.get("model_type", "")
    if family in _FAMILIES:
        return _decoder(config, _FAMILIES[family])
    builder = _BUILDERS.get(family)
    return builder(config) if builder else None


def size_keys(config: Config) -> dict[str, int | None]:
    """Lengths and counts that a formula reads -> the family's own; empty for a family without a formula."""
    family = config.get("model_type", "")
    more = {"n_inner": None} if family == "gpt2" else {"head_dim": None}
    own = {key: value for key, value in _with_defaults({"model_type": family}).items() if key != "model_type"}
    return {**more, **{key: value for key, value in own.items() if not isinstance(value, bool)}} if own else {}


def widest_rank(found: Iterable[Weight], targets: Sequence[str]) -> int | None:
    """The smaller dimension of the smallest layer that the targets name; None where they name none."""
    return min((min(w.shape) for w in found if w.layer and _chosen(w, targets)), default=None)


def with_adapters(found: Iterable[Weight], rank: int, targets: Sequence[str]) -> list[Weight]:
    """The weights frozen, and a pair of thin trained matrices beside each layer that the targets name.

    targets: names of layers or endings of them; all-linear: every one in a block (peft's rule: not the output layer)
    """
    result = []
    for w in found:
        result.append(replace(w, trained=False))
        chosen = _chosen(w, targets)
        if w.layer and chosen:
            outputs, inputs = reversed(w.shape) if w.transposed else w.shape
            blocks = [block for block in chosen if block is not None]
            for shape in ((rank, inputs), (outputs, rank)):
                result.append(Weight(shape, len(chosen), blocks=blocks, adapter=True))
    return result


def count(config: Config, found: Sequence[Weight], seq_len: int, *, recompute: bool = False) -> Parameters:
    """Parameters and cost of a model with these weights.

    FLOPs: 6 a trained weight of the linear part (the input embedding is a look-up, a tied head is not), 4 a frozen one,
    whose gradient nobody asks for, and 6 * layers * heads * head_dim * seq_len for causal attention, sliding windows
    not deducted (half of PaLM, arXiv:2204.02311, appendix B).

    Args:
        recompute: decoder blocks run forward a second time
    """
    embedding = sum(w.elements for w in found if w.embedding)
    linear = [w for w in found if not w.embedding or is_tied(config)]
    products = sum((6.0 if w.trained else 4.0) * w.elements * w.active for w in linear)
    size = sizes(config)
    pair = 6.0 * size.layers * size.queries
    attention = pair * seq_len
    again = 2.0 * sum(w.elements * w.active for w in found if w.blocks) + attention / 3
    return Parameters(
        sum(w.elements for w in found), sum(w.elements for w in found if w.trained), embedding, products + attention,
        again if recompute else 0.0, pair,
    )  # fmt: skip


def row_cost(plan: Mapping[str, Any]) -> tuple[float, float] | None:
    """(a, b): a row costs a * tokens + b * sum of its squared document lengths in FLOPs; None where it is not known.

    plan: as plan.json holds it
    """
    parameters = plan.get("parameters") or {}
    pair = parameters.get("attention_flops")  # not in the plan of an older launcher
    return (parameters["flops_per_token"] - pair * plan["seq_len"], pair) if pair else None


def sizes(config: Config) -> Sizes:
    """The lengths of a model whose weights a formula knows."""
    c = _with_defaults(config)
    if c["model_type"] == "gpt2":
        h, f = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
        return Sizes(
            hidden=h, layers=c["n_layer"], heads=c["n_head"], queries=h, keys=h, ffn=f, vocab=c["vocab_size"],
            gated=False, fused=True, rotary=False, norm="layer",
        )  # fmt: skip
    heads, d, family = c["num_attention_heads"], _head_dim(c), _FAMILIES.get(c["model_type"], _NEOX)
    used = int(c["num_experts_per_tok"]) if _experts(c) else 0
    width = c["intermediate_size"]
    return Sizes(
        hidden=c["hidden_size"], layers=c["num_hidden_layers"], heads=heads, queries=heads * d,
        keys=(c.get("num_key_value_heads") or heads) * d, vocab=c["vocab_size"], experts=used, all_experts=_experts(c),
        ffn=used * (c.get("moe_intermediate_size") or width) if used else width, gated=family is not _NEOX,
        fused=family.fused, softcap=bool(c.get("attn_logit_softcapping", c["model_type"] == "gemma2")),
        norms=family.norms, norm=family.norm, qk_norm=family.qk_norm,
    )  # fmt: skip


def is_tied(config: Config) -> bool:
    """Whether the output layer's weights are those of the input embedding."""
    # the family's default where the key is absent, never the other families' False
    return bool(_with_defaults(config).get("tie_word_embeddings", False))


def unknown_family(config: Config) -> str:
    """What to tell about a model whose parameters no formula here counts."""
    known = ", ".join(sorted([*_FAMILIES, *_BUILDERS]))
    near = difflib.get_close_matches(
        str(family := config.get("model_type")), [*_FAMILIES, *_BUILDERS], n=1, cutoff=0.85
    )
    meant = f". Did you mean '{near[0]}'?" if near else ""
    return f"no parameter formula for model_type {family!r} (known: {known}){meant}"


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets one family of gated RMSNorm decoders apart; `defaults` are those of its config class."""

    defaults: Mapping[str, Any]
    qkv_bias: bool | None = None  # None: as attention_bias says
    out_bias: bool | None = None
    norms: int = 2  # of hidden size, in each block
    norm: str = "rms"  # "rms32": its result is fp32 until the weight has been applied
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
    "gemma": _Family(_sizes(3072, 24576, 28, 16, 16, 256000, head_dim=256, **_TIED), norm="rms32"),
    "gemma2": _Family(_sizes(2304, 9216, 26, 8, 4, 256000, head_dim=256, **_TIED), norms=4, norm="rms32"),
    "gemma3_text": _Family(
        _sizes(2304, 9216, 26, 8, 4, 262208, head_dim=256, **_TIED), norms=4, norm="rms32", qk_norm="head"
    ),
    "phi3": _Family(_sizes(3072, 8192, 32, 32, None, 32064), fused=True),
    "olmo2": _Family(_sizes(4096, 11008, 32, 32, None, 50304), norm="rms32", qk_norm="width"),
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


def _chosen(w: Weight, targets: Sequence[str]) -> list[int | None]:
    """Blocks in which the targets name this layer; [None]: they do, outside the blocks."""
    return [block for block in w.blocks or (None,) if any(_means(w, block, target) for target in targets)]


def _means(w: Weight, block: int | None, target: str) -> bool:
    """Whether a target of `adapter.targets` names this layer, of this block or outside the blocks (None)."""
    if target == "all-linear":
        return block is not None
    name = w.layer.format(block)
    return name == target or name.endswith(f".{target}")


def _head_dim(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def _decoder(config: Config, family: _Family) -> list[Weight]:
    c = _with_defaults(config)
    h, layers, vocab = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    found = [Weight((vocab, h), embedding=True), Weight((h,))]
    if not is_tied(c):
        found.append(Weight((vocab, h), layer="lm_head"))
    norms = Weight((h,), family.norms * layers, blocks=range(layers))
    return [*found, norms, *_attention(c, family, layers), *_feed_forward(c, family, layers)]


def _linear(
    layer: str, outputs: int, inputs: int, blocks: Sequence[int], *, bias: bool = False, transposed: bool = False
) -> list[Weight]:
    """A linear layer in each of these blocks; none in no blocks."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    found = [Weight(shape, len(blocks), blocks=blocks, layer=layer, transposed=transposed)]
    if bias:
        found.append(Weight((outputs,), len(blocks), blocks=blocks))
    return found if blocks else []


def _attention(c: Config, family: _Family, layers: int) -> list[Weight]:
    h, d, every, at = c["hidden_size"], _head_dim(c), range(layers), "model.layers.{}.self_attn."
    queries, keys = c["num_attention_heads"] * d, (c.get("num_key_value_heads") or c["num_attention_heads"]) * d
    said = bool(c.get("attention_bias", False))
    qkv_bias = (said if family.qkv_bias is None else family.qkv_bias) and not family.fused
    out_bias = (said if family.out_bias is None else family.out_bias) and not family.fused
    rows = {"qkv_proj": queries + 2 * keys} if family.fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    found = [w for name, outputs in rows.items() for w in _linear(at + name, outputs, h, every, bias=qkv_bias)]
    found += _linear(at + "o_proj", h, queries, every, bias=out_bias)
    if family.qk_norm == "head":
        found.append(Weight((d,), 2 * layers, blocks=every))
    if family.qk_norm == "width":
        found += [Weight((queries,), layers, blocks=every), Weight((keys,), layers, blocks=every)]
    return found


def _feed_forward(c: Config, family: _Family, layers: int) -> list[Weight]:
    h, f, at = c["hidden_size"], c["intermediate_size"], "model.layers.{}.mlp."
    experts = _experts(c)
    sparse = _sparse_blocks(c, layers) if experts else []
    dense = [i for i in range(layers) if i not in set(sparse)]
    bias = bool(c.get("mlp_bias", False)) and not family.fused
    rows = {"gate_up_proj": 2 * f} if family.fused else {"gate_proj": f, "up_proj": f}
    found = [w for name, outputs in rows.items() for w in _linear(at + name, outputs, h, dense, bias=bias)]
    found += _linear(at + "down_proj", h, f, dense, bias=bias)
    if sparse:
        width, share = c.get("moe_intermediate_size") or f, c["num_experts_per_tok"] / experts
        found += [
            Weight((experts, h), len(sparse), blocks=sparse),  # the router
            Weight((experts, 2 * width, h), len(sparse), active=share, blocks=sparse),
            Weight((experts, h, width), len(sparse), active=share, blocks=sparse),
        ]
    return found


def _experts(c: Config) -> int:
    return int(c.get("num_local_experts") or c.get("num_experts") or 0)


def _sparse_blocks(c: Config, layers: int) -> list[int]:
    """Blocks with experts: every `decoder_sparse_step`-th, except those that the config keeps dense."""
    every, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
    return [i for i in range(layers) if i not in dense and (i + 1) % every == 0]


_NEOX = _Family({}, norm="layer", fused=True)
_GPT_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, **_TIED},
    "gpt_neox": _sizes(6144, 24576, 44, 64, None, 50432, attention_bias=True),
}


def _gpt2(config: Config) -> list[Weight]:
    c = _with_defaults(config)
    h, every, at = c["n_embd"], range(c["n_layer"]), "transformer.h.{}."
    f, vocab = c.get("n_inner") or 4 * h, c["vocab_size"]
    found = [Weight((vocab, h), embedding=True), Weight((c["n_positions"], h)), Weight((h,), 2)]
    found.append(Weight((h,), 4 * len(every), blocks=every))
    for name, inputs, outputs in (
        ("attn.c_attn", h, 3 * h), ("attn.c_proj", h, h), ("mlp.c_fc", h, f), ("mlp.c_proj", f, h),
    ):  # fmt: skip
        found += _linear(at + name, outputs, inputs, every, bias=True, transposed=True)
    return found if is_tied(c) else [*found, Weight((vocab, h), layer="lm_head")]


def _gpt_neox(config: Config) -> list[Weight]:
    c = _with_defaults(config)
    h, f, every, at = c["hidden_size"], c["intermediate_size"], range(c["num_hidden_layers"]), "gpt_neox.layers.{}."
    vocab, said = c["vocab_size"], c["attention_bias"]
    found = [Weight((vocab, h), embedding=True), Weight((h,), 2), Weight((h,), 4 * len(every), blocks=every)]
    for name, outputs, inputs, bias in (
        ("attention.query_key_value", 3 * h, h, said), ("attention.dense", h, h, said),
        ("mlp.dense_h_to_4h", f, h, True), ("mlp.dense_4h_to_h", h, f, True),
    ):  # fmt: skip
        found += _linear(at + name, outputs, inputs, every, bias=bias)
    return found if is_tied(c) else [*found, Weight((vocab, h), layer="embed_out")]


_BUILDERS: dict[str, Callable[[Config], list[Weight]]] = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}


def _cached(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model in the local cache (huggingface_hub: models--org--name/snapshots/COMMIT)."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser() / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    file = cache / "snapshots" / commit / "config.json" if commit else None
    return file if file and file.is_file() else None
