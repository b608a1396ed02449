"""The parameter formulas against models that transformers builds on the meta device."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.parameters import (
    _BUILDERS,
    _FAMILIES,
    Parameters,
    count,
    read_config,
    row_cost,
    unknown_family,
    weights,
    with_adapters,
)

SMALL = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 131,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
CASES = [
    *({"model_type": family, **SMALL} for family in sorted(_FAMILIES) if family not in ("mixtral", "qwen3_moe")),
    {"model_type": "llama", **SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
     "head_dim": 10},
    {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2},
    {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    {"model_type": "qwen3", **SMALL, "head_dim": 16, "attention_bias": True},
    {"model_type": "gemma", **SMALL, "tie_word_embeddings": False},
    {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen3_moe", **SMALL, **EXPERTS},
    {"model_type": "qwen3_moe", **SMALL, **EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 131, "n_positions": 64},
    {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 131, "n_inner": 100},
    {"model_type": "gpt_neox", **NEOX},
    {"model_type": "gpt_neox", **NEOX, "attention_bias": False},
]  # fmt: skip


def model_on_meta(config: dict) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"pad_token_id": None, **config}))


def shapes_on_meta(config: dict) -> Counter[tuple[int, ...]]:
    return Counter(tuple(p.shape) for p in model_on_meta(config).parameters())


def linear_layers_on_meta(config: dict) -> set[str]:
    import torch
    from transformers.pytorch_utils import Conv1D

    model = model_on_meta(config)
    head = model.get_output_embeddings()
    return {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}


@pytest.mark.parametrize("config", CASES, ids=lambda c: c["model_type"] + "-" + str(len(c)))
def test_formula_gives_exactly_the_shapes_of_the_model_on_the_meta_device(config):
    formula: Counter[tuple[int, ...]] = Counter()
    for weight in weights(config) or []:
        formula[weight.shape] += weight.times
    assert formula == shapes_on_meta(config)


def test_every_family_with_a_formula_is_compared_with_transformers():
    assert {case["model_type"] for case in CASES} == {*_FAMILIES, *_BUILDERS}


LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def counted(config: dict[str, Any], seq_len: int, *, recompute: bool = False) -> Parameters:
    found = weights(config)
    assert found is not None
    return count(config, found, seq_len, recompute=recompute)


def test_llama3_8b_costs_51_gflop_a_token_at_8192_as_published_tables_imply():
    parameters = counted(LLAMA3_8B, 8192)
    assert parameters.total == parameters.trainable == 8_030_261_248
    assert parameters.flops_per_token == pytest.approx(51.47e9, rel=1e-3)


def test_a_row_costs_its_tokens_and_its_squared_document_lengths() -> None:
    parameters = counted(LLAMA3_8B, 8192)
    a, b = row_cost({"parameters": asdict(parameters), "seq_len": 8192})
    assert b == 6 * 32 * 4096
    assert a == pytest.approx(6 * (8_030_261_248 - 128256 * 4096))
    assert 8192 * a + 8192**2 * b == pytest.approx(8192 * parameters.flops_per_token)
    assert row_cost({"parameters": None, "seq_len": 8192}) is None


def test_lora_costs_four_for_a_frozen_weight_six_for_its_own_and_all_of_attention():
    found = with_adapters(weights(LLAMA3_8B) or [], 8, ["all-linear"])
    parameters = count(LLAMA3_8B, found, 4096)
    thin = 32 * 8 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    attention = 6 * 32 * 4096 * 4096
    assert (parameters.total, parameters.trainable) == (8_030_261_248 + thin, thin)
    assert parameters.flops_per_token == 4 * (8_030_261_248 - 128256 * 4096) + 6 * thin + attention


def test_recomputed_blocks_cost_one_more_forward_beside_the_model_flops():
    once, twice = counted(LLAMA3_8B, 8192), counted(LLAMA3_8B, 8192, recompute=True)
    blocks = 8_030_261_248 - 2 * 128256 * 4096 - 4096
    assert twice.flops_per_token == once.flops_per_token
    assert (once.recompute_flops_per_token, twice.recompute_flops_per_token) == (
        0, 2 * blocks + 2 * 32 * 4096 * 8192,
    )  # fmt: skip


@pytest.mark.parametrize("config", CASES, ids=lambda c: c["model_type"] + "-" + str(len(c)))
def test_all_linear_means_every_linear_layer_of_the_blocks_under_its_own_name(config):
    names = {w.layer.format(b) for w in weights(config) or [] if w.layer for b in w.blocks}
    assert names == linear_layers_on_meta(config)


@pytest.mark.parametrize(
    ("targets", "pairs"),
    [(["q_proj"], 3), (["self_attn.q_proj", "v_proj"], 6), (["layers.1.mlp.down_proj"], 1),
     (["model.layers.2.self_attn.k_proj"], 1), (["lm_head"], 1), (["proj"], 0), (["all-linear"], 21)],
)  # fmt: skip
def test_targets_are_whole_names_or_endings_of_them(targets, pairs):
    found = with_adapters(weights({"model_type": "llama", **SMALL}) or [], 4, targets)
    assert sum(w.times for w in found if w.adapter) == 2 * pairs
    assert not any(w.trained and not w.adapter for w in found)


def test_adapters_of_gpt2_know_that_its_matrices_are_transposed():
    found = with_adapters(weights({"model_type": "gpt2", "n_layer": 1, "n_embd": 8}) or [], 2, ["c_attn"])
    assert [w.shape for w in found if w.adapter] == [(2, 8), (24, 2)]


def test_every_block_holds_what_the_model_holds_divided_by_its_blocks():
    for config in CASES:
        for w in weights(config) or []:
            assert not w.blocks or w.times % len(w.blocks) == 0


def test_tied_head_is_counted_once_but_costs_its_product():
    tied, untied = counted(LLAMA3_8B | {"tie_word_embeddings": True}, 512), counted(LLAMA3_8B, 512)
    assert untied.total - tied.total == 128256 * 4096
    assert untied.flops_per_token == tied.flops_per_token


def test_mixture_of_experts_costs_only_the_experts_a_token_uses():
    config = {"model_type": "mixtral"}
    one, two = (counted(config | {"num_experts_per_tok": used}, 128) for used in (1, 2))
    assert two.flops_per_token - one.flops_per_token == pytest.approx(6 * 32 * 3 * 4096 * 14336)


def test_unknown_family_says_which_ones_are_known():
    assert weights({"model_type": "mamba"}) is None
    assert "mamba" in unknown_family({"model_type": "mamba"})
    assert "llama" in unknown_family({"model_type": "mamba"})


def test_config_is_read_from_a_folder_or_the_hub_cache_and_a_missing_one_says_so(tmp_path: Path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA3_8B))
    assert read_config(str(tmp_path / "model"), None) == (LLAMA3_8B, "")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config, note = read_config("org/small", None)
    assert config is None
    assert "org/small" in note

    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SMALL))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    assert read_config("org/small", None) == (SMALL, "")
    assert read_config("org/small", None, revision="abc") == (SMALL, "")
