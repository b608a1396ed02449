"""L4 and L5 through the real trainer: a run that stops in the middle goes on under the same or any other strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.data.batches import Batches
from launcher.recipe.schema import to_dict
from launcher.run.control import clear_stop, read_outcomes, request_stop
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.trainer import loop
from launcher.trainer.main import run_rank
from launcher.trainer.metrics import read_metrics
from tests.ranks import run_ranks
from tests.trainer import make
from tests.trainer.checkpoint import crossing, rigs

pytestmark = pytest.mark.gloo

Rows = dict[int, list[int]]
STEPS_OF_L4 = 5
STRATEGIES = [
    "hsdp",
    "zero1",
    "zero2",
    "zero3",
    "zero3-offload",
]  # ddp and fsdp2: test_loop and checkpoint/test_engines
LEGS = [("ddp", 2), ("zero3", 3), ("fsdp2", 2), ("zero1", 1), ("zero3-offload", 2), ("hsdp", 4), ("zero2", 2)]


def one_attempt(path: Path, attempt: int, *, stop_at: int | None) -> Rows:
    """An attempt on this rank, the rows of its steps; a stop asked for during step `stop_at` ends it one step later."""
    accumulate, deal, rows = loop.accumulate, Batches.step, dict[int, list[int]]()

    def watched(t: Any, batch: Any) -> Any:
        if t.step == stop_at and t.ranks.rank == 0:
            request_stop(t.run, "test")
        return accumulate(t, batch)

    def noted(self: Batches, step: int) -> Any:
        batch = deal(self, step)
        rows[step] = batch.rows.tolist()
        return batch

    loop.accumulate, Batches.step = watched, noted  # type: ignore[assignment, method-assign]
    try:
        run_rank(str(path), attempt)
    finally:
        loop.accumulate, Batches.step = accumulate, deal  # type: ignore[method-assign]
    return rows


def rank_of_leg(rank: int, world_size: int, path: Path, attempt: int, stop_at: int | None) -> Rows:
    """One attempt of a run whose recipe changes between attempts."""
    return one_attempt(path, attempt, stop_at=stop_at)


def rank_of_L4(rank: int, world_size: int, folder: Path, strategies: list[str]) -> None:
    """For each strategy: a run without a stop, and one that is stopped after 3 of 5 steps and resumed."""
    for strategy in strategies:
        for name, stops in (("whole", [None]), ("stopped", [1, None])):
            run = RunDirectory(folder / strategy / name / "run")
            for stop_at in stops:
                if rank == 0:
                    clear_stop(run)
                    start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
                dist.barrier()
                one_attempt(run.path, 1 + (len(stops) > 1 and stop_at is None), stop_at=stop_at)
                dist.barrier()


def losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("resumed")
    for strategy in STRATEGIES:
        for name in ("whole", "stopped"):
            (folder / strategy / name).mkdir(parents=True)
            recipe = crossing.recipe(strategy, "fp32", 2)
            make.make_run(folder / strategy / name, recipe, total_steps=STEPS_OF_L4, evaluation=False)
    run_ranks(rank_of_L4, 2, folder, STRATEGIES)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_L4_a_stopped_and_resumed_run_is_bit_for_bit_one_that_never_stopped(resumed: Path, strategy: str) -> None:
    whole, stopped = (RunDirectory(resumed / strategy / name / "run") for name in ("whole", "stopped"))
    assert [ref.step for ref in valid_checkpoints(stopped)] == [3, STEPS_OF_L4]
    assert {o.kind for o in read_outcomes(stopped, 1).values()} == {"stopped"}
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == STEPS_OF_L4
    ends = [rigs.read_back(valid_checkpoints(run)[-1].path) for run in (whole, stopped)]
    assert rigs.same(*ends)


def test_L5_a_run_goes_through_every_strategy_and_rank_count_with_the_same_samples_and_losses(tmp_path: Path) -> None:
    total = 2 * len(LEGS)
    for name in ("whole", "changing"):
        (tmp_path / name).mkdir()
    whole = make.make_run(
        tmp_path / "whole", crossing.recipe("ddp", "fp32", 1), total_steps=total, evaluation=False
    )  # fmt: skip
    attempt = start_attempt(whole, target="test", job_id=None, nodes=["here"], reason="test")
    (expected,) = run_ranks(rank_of_leg, 1, whole.path, attempt, None)
    run = make.make_run(tmp_path / "changing", crossing.recipe("ddp", "fp32", 2), total_steps=total, evaluation=False)
    for number, (strategy, world_size) in enumerate(LEGS):
        begin, last = 2 * number, number == len(LEGS) - 1
        run.write_recipe(to_dict(crossing.recipe(strategy, "fp32", world_size)))
        clear_stop(run)
        attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
        for rows in run_ranks(rank_of_leg, world_size, run.path, attempt, None if last else begin):
            assert {begin, begin + 1} <= rows.keys()
            assert all(rows[step] == expected[step] for step in rows), f"{strategy} on {world_size}: other samples"
        ends = {(o.kind, o.step) for o in read_outcomes(run, attempt).values()}
        assert ends == {("finished" if last else "stopped", begin + 2)}, strategy
    found, wanted = losses(run), losses(whole)
    assert list(found) == list(wanted) == list(range(1, total + 1))
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), (step, LEGS[(step - 1) // 2])
