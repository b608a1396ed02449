"""Several real ranks and one checkpoint: a save that fails on one of them, a bad file that only one of them reads."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint.format import CheckpointError, Piece, rank_file
from launcher.trainer.checkpoint.manager import CheckpointManager
from tests.ranks import run_ranks
from tests.trainer.checkpoint import rigs

pytestmark = pytest.mark.gloo


class Replica(rigs.FlatEngine):
    """A whole copy on every rank, as under DDP."""

    def pieces(self):
        copy = (self.rank, self.world_size)
        return [Piece(p.name, p.kind, p.start, p.tensor, *copy) for p in rigs.FlatEngine.pieces(self.alone())]

    def alone(self) -> rigs.FlatEngine:
        whole = rigs.FlatEngine(self.module)
        self.ensure_state()
        whole.moments = self.moments
        return whole


def manager_of(path: Path, rank: int, world_size: int) -> CheckpointManager:
    run = RunDirectory(path)
    meta = {"run_id": "this-run"}
    return CheckpointManager(run, attempt=ledger.latest_attempt(run), rank=rank, world_size=world_size, meta=meta)


def save_as_replicas(rank: int, world_size: int, path: Path) -> tuple[int, str]:
    manager = manager_of(path, rank, world_size)
    manager.save(1, Replica(torch.nn.Linear(1000, 10), rank=rank, world_size=world_size), {})
    status = manager.wait()
    return status.bytes, status.state


def test_replicas_share_the_writing_about_equally(tmp_path):
    rigs.begin(tmp_path)
    results = run_ranks(save_as_replicas, 3, tmp_path)
    sizes = [size for size, _ in results]
    assert [state for _, state in results] == ["done"] * 3
    assert 40_000 < min(sizes) <= max(sizes) < 41_000  # a third of 120,120 bytes and a header


def fail_on_rank_1_and_go_on(rank: int, world_size: int, path: Path) -> list[Any]:
    manager, engine = (
        manager_of(path, rank, world_size),
        rigs.FlatEngine(torch.nn.Linear(10_000, 1), rank=rank, world_size=world_size),
    )
    told = []
    for step, limit in ((1, None), (2, 10_000), (3, None)):
        soft = resource.RLIM_INFINITY if limit is None or rank != 1 else limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        manager.save(step, engine, {"step": step})
        status = manager.wait()
        told.append((status.state, status.reason))
    return told


def test_L7_a_quota_on_one_rank_fails_that_save_on_all_and_the_next_succeeds(tmp_path):
    run, _ = rigs.begin(tmp_path)
    results = run_ranks(fail_on_rank_1_and_go_on, 3, tmp_path)
    reason = f"rank 1: {rank_file(1)}: File too large"
    for rank, told in enumerate(results):
        elsewhere = "another rank failed; rank 0 has the reason"
        assert told == [("done", None), ("failed", reason if rank < 2 else elsewhere), ("done", None)]
    assert [ref.step for ref in ledger.valid_checkpoints(run)] == [1, 3]
    assert not run.checkpoint(2, 1).exists()


def load(rank: int, world_size: int, path: Path) -> tuple[Any, list[str], str | None]:
    manager = manager_of(path, rank, world_size)
    engine = rigs.FlatEngine(rigs.OddShapes(seed=9), rank=rank, world_size=world_size)
    try:
        state = manager.load_latest(engine)
    except CheckpointError as error:
        return str(error), manager.problems, None
    expected = rigs.FlatEngine(rigs.OddShapes(seed=state["step"]), rank=rank, world_size=world_size)
    for mine, true in zip(engine.pieces(), expected.pieces(), strict=True):
        assert torch.equal(mine.tensor, true.tensor), mine.name
    return state, manager.problems, manager.loaded


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def test_L7_all_ranks_leave_a_checkpoint_of_which_one_of_them_found_a_file_bad(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    for step in (10, 20, 30):
        assert rigs.save_with_ranks(run, attempt, step, [rigs.OddShapes(seed=step)] * 4) == [""] * 4
    spoil(run.checkpoint(30, attempt) / rank_file(3))  # read by rank 1 of 2
    (run.checkpoint(20, attempt) / rank_file(2)).unlink()  # read by rank 0
    rigs.begin(tmp_path)
    results = run_ranks(load, 2, tmp_path)
    assert results[0] == results[1]
    state, problems, name = results[0]
    assert (state, name) == ({"step": 10}, "step-00000010-a1")
    assert [problem.split(":")[0] for problem in problems] == [
        f"step-00000030-a1/{rank_file(3)}",
        f"step-00000020-a1/{rank_file(2)}",
    ]


def test_L7_all_ranks_raise_when_no_checkpoint_is_good(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    rigs.save_with_ranks(run, attempt, 10, [rigs.OddShapes()] * 2)
    spoil(run.checkpoint(10, attempt) / rank_file(1))
    rigs.begin(tmp_path)
    texts = [text for text, _, _ in run_ranks(load, 3, tmp_path)]
    assert len(set(texts)) == 1
    assert texts[0].startswith("every checkpoint of this run is bad; none was deleted:\nstep-00000010-a1/rank-00001")
