"""Bytes on the wire against figures by hand: Llama-3 8B on eight ranks, every strategy."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.plan import Traffic, make_plan
from launcher.recipe.schema import Adapter
from tests.plan.test_memory import ROOT, P, recipe

BLOCKS = P - ROOT
SENT = 7 / 8  # of what a collective of 8 ranks moves


def sent(forwards: int = 1, *, adapter: Adapter | None = None, nodes: int = 1, zero: Any = None, **strategy) -> Traffic:
    made = recipe(nodes, **strategy)
    made.train.global_batch_size *= forwards
    made.adapter = adapter or Adapter()
    for key, value in (zero or {}).items():
        setattr(made.strategy.zero, key, value)
    found = make_plan(made).traffic
    assert found is not None
    return found


@pytest.mark.parametrize("forwards", [1, 4])
@pytest.mark.parametrize(
    ("strategy", "gather", "reduce", "across"),
    [  # elements x bytes, for g forward passes
        ({"kind": "ddp"}, lambda g: 0, lambda g: 0, 2 * P * 4),
        ({"kind": "fsdp2"}, lambda g: g * 2 * (BLOCKS * 2 + ROOT), lambda g: g * 4 * P, 0),
        ({"kind": "fsdp2", "reshard_after_forward": False}, lambda g: 2 * P, lambda g: 4 * P, 0),
        ({"kind": "zero1"}, lambda g: 2 * P, lambda g: 2 * 4 * P, 0),
        ({"kind": "zero2"}, lambda g: 2 * P, lambda g: g * 2 * 4 * P, 0),
    ],
)
def test_bytes_of_a_step_of_llama3_8b_in_bf16_arithmetic(strategy, gather, reduce, across, forwards):
    found = sent(forwards, **strategy)
    assert (found.gather, found.reduce, found.across) == (
        round(SENT * gather(forwards)), round(SENT * reduce(forwards)), SENT * across,
    )  # fmt: skip
    assert found.total == found.gather + found.reduce + found.across


def test_zero3_gathers_small_weights_once_a_step_and_the_others_twice_a_forward():
    norms = 65 * 4096
    found = sent(3, kind="zero3")
    assert found.gather == SENT * 2 * (3 * 2 * (P - norms) + norms)
    assert found.reduce == SENT * 3 * 4 * P


def test_zeropp_quantises_both_ways_and_gathers_for_the_backward_pass_within_the_node():
    norms = 65 * 4096
    found = sent(nodes=2, kind="zero3", zero={"quantized_weights": True, "quantized_gradients": True})
    assert found.gather == 15 / 16 * (2 * (P - norms) + 2 * norms)
    assert found.reduce == 15 / 16 * P / 2
    near = sent(nodes=2, kind="zero3", zero={"hpz_partition_size": 8})
    assert near.gather == 15 / 16 * 2 * (P - norms) + 7 / 8 * 2 * (P - norms) + 15 / 16 * 2 * norms


def test_hsdp_gathers_inside_and_averages_a_shard_across():
    found = sent(nodes=2, kind="fsdp2", shard=8)
    assert (found.gather, found.reduce) == (SENT * 2 * (BLOCKS * 2 + ROOT), SENT * 4 * P)
    assert found.across == 2 * 4 * P / 8 * 1 / 2


def test_a_smaller_group_after_the_forward_pass_gathers_its_larger_shards_again():
    found = sent(nodes=2, kind="fsdp2", reshard_after_forward=8)
    assert found.gather == 15 / 16 * 2 * P + 7 / 8 * 2 * BLOCKS


def test_lora_gathers_everything_and_reduces_what_learns():
    lora = Adapter(kind="lora", rank=16)
    thin = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    found = sent(adapter=lora, kind="fsdp2")
    assert found.gather == SENT * 2 * ((BLOCKS + thin) * 2 + ROOT)
    assert found.reduce == SENT * 4 * thin
    assert sent(adapter=lora, kind="ddp").across == SENT * 2 * 4 * thin


def test_tokens_that_hide_the_traffic_are_those_of_the_published_rule_of_thumb():
    found = sent(kind="fsdp2")
    bytes_by_rule, flops_by_rule = 8 * P, 6 * P  # 1,650 tokens at 400 GB/s, 13,200 at 50 GB/s
    shown = make_plan(recipe(kind="fsdp2")).parameters
    assert shown is not None
    ratio = found.total / bytes_by_rule / (shown.flops_per_token / flops_by_rule)
    assert found.hidden_at_nvlink == pytest.approx(1650 * ratio, rel=1e-3)
    assert found.hidden_at_network == pytest.approx(13_200 * ratio, rel=1e-3)
    assert found.tokens_per_rank == 8192
    assert sent(4, kind="fsdp2").tokens_per_rank == 4 * 8192


def test_one_rank_sends_nothing():
    made = recipe(kind="fsdp2")
    made.cluster.nproc_per_node = 1
    found = make_plan(made).traffic
    assert found is not None
    assert (found.total, found.hidden_at_network) == (0, 0)
