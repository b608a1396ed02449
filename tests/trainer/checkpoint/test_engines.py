"""L4 and L5 on real engines: state is equal bit by bit over engines and numbers of ranks; data and losses go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.trainer import make
from tests.trainer.checkpoint import rigs, training

pytestmark = pytest.mark.gloo

HSDP = {"strategy__replicate": 2, "strategy__shard": 2}
OFFLOAD = {"strategy__offload__params": "cpu", "strategy__offload__optimizer": "cpu"}
KEEP_GATHERED = {"strategy__reshard_after_forward": False}
TIED = {"config": {**make.LLAMA, "tie_word_embeddings": True}}


def leg(path: Path, kind: str, world_size: int, to_step: int, **changes: Any) -> dict[str, Any]:
    """A new attempt of the run; what rank 0 saw, after checking that all ranks saw the same."""
    rigs.begin(path)
    results = ranks.run_ranks(training.train, world_size, path, kind, to_step, changes)
    for other in results[1:]:
        assert (other["loaded"], other["final"]) == (results[0]["loaded"], results[0]["final"])
    return {**results[0], "sizes": [result["bytes"] for result in results]}


def travel(path: Path, legs: list[tuple[str, int, dict[str, Any]]], **common: Any) -> None:
    """Two steps on each of the legs; state must survive each change, and losses follow the run that never stopped."""
    for name in ("whole", "changing"):
        (path / name).mkdir()
        make.documents_store(path / name)
    whole = leg(path / "whole", *legs[0][:2], 2 * len(legs), **legs[0][2], **common)
    before: dict[str, Any] = {}
    for i, (kind, world_size, changes) in enumerate(legs):
        now = leg(path / "changing", kind, world_size, 2 * i + 2, **changes, **common)
        assert now["start"] == 2 * i
        assert now["problems"] == []
        if before:
            assert now["loaded"] == before["final"], f"state changed on the way to {kind} on {world_size}"
        for step, loss in now["losses"].items():
            assert now["rows"][step] == whole["rows"][step]
            expected = float.fromhex(whole["losses"][step])
            assert abs(float.fromhex(loss) - expected) <= 1e-5 * abs(expected), (kind, world_size, step)
        before = now


def test_L5_ranks_4_to_2_to_3_to_1_and_ddp_to_fsdp2_and_back(tmp_path):
    travel(tmp_path, [("ddp", 4, {}), ("fsdp2", 2, {}), ("fsdp2", 3, {}), ("ddp", 1, {}), ("fsdp2", 2, OFFLOAD)])


def test_L5_hsdp_to_and_from_fsdp2_and_ddp(tmp_path):
    travel(tmp_path, [("fsdp2", 4, HSDP), ("fsdp2", 3, KEEP_GATHERED), ("fsdp2", 4, HSDP), ("ddp", 2, {})])


def test_L5_tied_weights_travel_once(tmp_path):
    travel(tmp_path, [("fsdp2", 2, {}), ("ddp", 3, {})], **TIED)


def test_bf16_weights_and_moments_travel_bit_by_bit(tmp_path):
    make.documents_store(tmp_path)
    first = leg(tmp_path, "fsdp2", 3, 2, model__dtype="bf16")
    second = leg(tmp_path, "ddp", 2, 3, model__dtype="bf16")
    third = leg(tmp_path, "fsdp2", 2, 3, model__dtype="bf16")
    assert second["loaded"] == first["final"]
    assert third["loaded"] == second["final"]


@pytest.mark.parametrize(
    ("kind", "world_size", "changes"),
    [("ddp", 2, {}), ("fsdp2", 2, {}), ("fsdp2", 4, HSDP), ("fsdp2", 2, KEEP_GATHERED)],
)
def test_L4_a_resume_with_the_same_engine_and_ranks_is_bit_exact(tmp_path, kind, world_size, changes):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        make.documents_store(tmp_path / name)
    whole = leg(tmp_path / "whole", kind, world_size, 5, **changes)
    leg(tmp_path / "stopped", kind, world_size, 2, **changes)
    resumed = leg(tmp_path / "stopped", kind, world_size, 5, **changes)
    assert resumed["losses"] == {step: whole["losses"][step] for step in (2, 3, 4)}
    assert resumed["final"] == whole["final"]
    assert max(resumed["sizes"]) < 1.1 * min(resumed["sizes"]), "ranks do not share the writing"
