"""The hash of what ranks hold in common, and who is named where they differ."""

from __future__ import annotations

import pytest
import torch

from launcher.trainer import replicas
from launcher.trainer.replicas import differing, fingerprint, message, weighted_sum

HASHES = [fingerprint, weighted_sum]  # of host memory, and as a GPU does it


@pytest.mark.parametrize("of", HASHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_every_single_flipped_bit_changes_the_hash(dtype, of):
    values = torch.randn(16).to(dtype)
    clean = of(values).item()
    raw = values.view(torch.uint8)
    for at in range(raw.numel()):
        for bit in range(8):
            raw[at] ^= 1 << bit
            assert of(values).item() != clean
            raw[at] ^= 1 << bit
    assert of(values).item() == clean


@pytest.mark.parametrize("of", HASHES)
def test_place_counts_in_the_whole_tensor_and_bits_count_not_values(of, monkeypatch):
    monkeypatch.setattr(replicas, "_PART", 128)
    values = torch.randn(1000)
    swapped = values.clone()
    swapped[[3, 131, 900]] = swapped[[131, 900, 3]]
    assert of(values) != of(swapped)
    assert of(values) == of(values.clone())
    assert of(torch.tensor([0.0])) != of(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert of(nan) == of(nan.clone())


def test_the_minority_is_named_and_two_that_differ_are_both_named():
    assert differing([(0, 7)] * 4) is None
    assert differing([(0, 7), (0, 7), (0, 8), (0, 7)]) == ([2], [0, 1, 3])
    assert differing([(0, 7), (0, 8), (0, 9), (0, 7), (0, 7)]) == ([1, 2], [0, 3, 4])
    assert differing([(0, 7), (0, 8)]) == ([0, 1], [])
    assert differing([(0, 1), (0, 2), (0, 2), (0, 1)]) == ([0, 1, 2, 3], [])


def test_ranks_are_compared_with_those_of_their_own_part_alone():
    assert differing([(0, 7), (1, 9), (0, 7), (1, 9)]) is None
    assert differing([(0, 7), (1, 9), (0, 7), (1, 8), (0, 7), (1, 9)]) == ([3], [1, 5])


def test_the_message_names_rank_node_tensor_and_the_way_on():
    hashes = [[1, 2, 3], [1, 5, 6], [1, 2, 3]]
    said = message(12, ([1], [0, 2]), ["a", "b", "a"], ["x", "y", "z"], hashes)
    assert said.startswith(
        "after step 12: rank 1 on b holds other weights than the other 2 ranks, first in y and 1 more"
    )
    assert "the run can go on from it" in said
    two = message(4, ([0, 1], []), ["a", "b"], ["x"], [[1], [2]])
    assert "rank 0 on a and rank 1 on b hold different weights, and no majority" in two
