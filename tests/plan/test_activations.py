"""The activation formulas against what autograd saves in transformers' own models, byte by byte."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.plan.activations import CHUNK_BYTES, Arithmetic, adapter_bytes, block_bytes, kept_bytes, loss_bytes
from launcher.plan.parameters import Sizes, sizes, weights, with_adapters

TOKENS = 96
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 131, "num_hidden_layers": 2}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], float]] = {  # changes of the config, largest surplus of the formula
    "llama": ({}, 0.0),
    "qwen3": ({"head_dim": 16}, 0.0),
    "olmo2": ({}, 0.0),
    "gemma3_text": ({"head_dim": 16}, 0.003),
    "phi3": ({}, 0.06),
    "gpt_neox": ({}, 0.06),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 0.001),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 40, "num_experts_per_tok": 2}, 0.006),
    "gpt2": ({}, 0.86),
}


def saved_bytes(config: dict[str, Any], *, layers: int, attention: str, compute: str, autocast: bool) -> int:
    """Bytes of every tensor that autograd keeps of a forward pass over two documents, parameters not counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**{"pad_token_id": None, **config, "num_hidden_layers": layers})
    dtype = torch.bfloat16 if compute == "bf16" and not autocast else torch.float32
    lm = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention).train()
    own, kept = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dim() and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    halves = torch.arange(TOKENS // 2).repeat(2)[None]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        lm.base_model(input_ids=halves + 1, position_ids=halves, attention_mask=None, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def config_of(family: str) -> dict[str, Any]:
    if family == "gpt2":
        none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 131, "n_positions": 128, **none}
    config = {"model_type": family, **SMALL, **FAMILIES[family][0]}
    if family == "gpt_neox":
        del config["num_key_value_heads"]
    return config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_keeps_what_autograd_saves_of_it(family, attention):
    config, surplus = config_of(family), FAMILIES[family][1]
    for compute in ("fp32", "bf16"):
        two, three = (
            saved_bytes(config, layers=n, attention=attention, compute=compute, autocast=False) for n in (2, 3)
        )
        width = 4 if compute == "fp32" else 2
        told = TOKENS * block_bytes(
            sizes(config), Arithmetic(compute=width, weight=width, attention=attention, device="cpu"), TOKENS
        )
        assert (three - two) * 0.997 <= told <= (three - two) * (1 + surplus) + TOKENS, (compute, told, three - two)


def test_under_autocast_each_product_keeps_a_rounded_input_of_its_own_and_its_weight():
    config = config_of("llama")
    two, three = (saved_bytes(config, layers=n, attention="sdpa", compute="bf16", autocast=True) for n in (2, 3))
    how = Arithmetic(compute=2, weight=4, autocast=True, attention="sdpa", device="cpu")
    cast = sum(2 * w.elements // 2 for w in weights(config) or [] if w.layer and w.blocks)
    assert three - two == TOKENS * block_bytes(sizes(config), how, TOKENS) + cast


LLAMA3_8B = Sizes(hidden=4096, layers=32, heads=32, queries=4096, keys=1024, ffn=14336, vocab=128256)
FLASH = Arithmetic(compute=2, weight=2)


def test_llama3_8b_keeps_200_kb_a_token_and_block_and_176_kb_with_fused_kernels_of_norm_and_no_mask():
    assert block_bytes(LLAMA3_8B, FLASH, 8192) == 16 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 8 * 14336 + 4 * 32 + 8
    liger = Arithmetic(compute=2, weight=2, liger=True)
    assert block_bytes(LLAMA3_8B, liger, 8192) == 8 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 6 * 14336 + 4 * 32 + 8


def test_each_mode_of_recomputation_keeps_less_than_the_one_before():
    kept = [
        kept_bytes(LLAMA3_8B, FLASH, mode, tokens=8192, seq_len=8192)
        for mode in ("none", "selective", "full", "offload")
    ]  # fmt: skip
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    block, outside = block_bytes(LLAMA3_8B, FLASH, 8192), (2 + 6 + 2) * 4096
    assert kept[2] == 8192 * (32 * 2 * 4096 + block + outside)
    assert kept[3] == 8192 * (2 * 2 * 4096 + block + outside)


def test_masks_of_eager_grow_with_the_square_of_the_row_and_flash_has_none():
    def per_token(attention: str, seq_len: int) -> int:
        return block_bytes(LLAMA3_8B, Arithmetic(compute=2, weight=2, attention=attention), seq_len)

    assert per_token("auto", 512) == per_token("flash_attention_3", 4096)
    assert per_token("eager", 4096) - per_token("eager", 2048) == 32 * 6 * 2048
    assert per_token("sdpa", 4096) - per_token("sdpa", 2048) == 2 * 2048


def test_the_chunk_of_the_loss_is_that_of_the_trainer():
    from launcher.trainer.objectives import chunked

    assert CHUNK_BYTES == chunked.CHUNK_BYTES


def test_the_loss_holds_a_chunk_of_logits_the_gradient_of_the_head_and_of_the_hidden_states():
    head, states = 128256 * 4096, 8192 * 4096
    chunk = (2**28 // (4 * 128256)) * 128256
    assert loss_bytes(LLAMA3_8B, FLASH, tokens=8192, head_trained=True) == 6 * chunk + 6 * head + 2 * states
    assert loss_bytes(LLAMA3_8B, FLASH, tokens=8192, head_trained=False) == 6 * chunk + 2 * states
    kept_twice = Arithmetic(compute=4, weight=4)
    assert loss_bytes(LLAMA3_8B, kept_twice, tokens=8192, head_trained=True) == 4 * chunk + 8 * head + 4 * states
    few = loss_bytes(LLAMA3_8B, FLASH, tokens=10, head_trained=False)
    assert few == 10 * (6 * 128256 + 2 * 4096)


def test_adapters_keep_what_lies_between_their_matrices_and_with_dropout_a_copy_of_their_input():
    config = {"model_type": "llama", **SMALL}
    found = with_adapters(weights(config) or [], 8, ["q_proj", "down_proj"])
    plain = adapter_bytes(found, FLASH, dropout=0.0, layers=2)
    assert plain == 2 * 8 * 2
    assert adapter_bytes(found, FLASH, dropout=0.1, layers=2) == plain + 3 * (64 + 160)
    rounded = Arithmetic(compute=2, weight=4, autocast=True)
    assert adapter_bytes(found, rounded, dropout=0.0, layers=2) == plain + 2 * (64 + 160)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_recomputed_block_keeps_what_lives_on_after_its_forward_pass(mode, compute):
    width = 4 if compute == "fp32" else 2
    two, three = (bytes_alive_after_forward(layers, mode, compute) for layers in (2, 3))
    size, how = sizes(config_of("llama")), Arithmetic(compute=width, weight=width)
    told = kept_bytes(size, how, mode, tokens=TOKENS, seq_len=TOKENS)
    more = kept_bytes(replace(size, layers=3), how, mode, tokens=TOKENS, seq_len=TOKENS) - told
    assert three - two == more + RANDOM_STATE


RANDOM_STATE = 5056  # bytes that torch keeps of its generator for each recomputed block, on the host


def bytes_alive_after_forward(layers: int, mode: str, compute: str) -> int:
    """Bytes of all tensors that a forward pass leaves behind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.trainer import activations

    made = AutoConfig.for_model(**{**config_of("llama"), "num_hidden_layers": layers})
    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    lm = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa").train()
    activations.apply(SimpleNamespace(lm=lm, blocks=lambda: list(lm.model.layers)), mode)  # type: ignore[arg-type]
    positions = torch.arange(TOKENS)[None]
    before = _storages()
    kept = lm.base_model(input_ids=positions + 1, position_ids=positions, attention_mask=None, use_cache=False)
    found = sum(size for place, size in _storages().items() if place not in before)
    del kept
    return found


def _storages() -> dict[int, int]:
    import torch

    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
