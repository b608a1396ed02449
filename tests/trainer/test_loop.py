"""The loop on real ranks: to the end, stopped and resumed, over a failed save; what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.run.control import clear_stop, read_outcomes, request_stop
from launcher.run.ledger import valid_checkpoints
from launcher.run.state import read_state
from launcher.trainer.metrics import read_metrics
from tests.trainer import make

pytestmark = pytest.mark.gloo


def losses(run: Any) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


def test_a_run_trains_to_its_end_and_leaves_metrics_evaluation_picture_state_and_checkpoint(tmp_path: Path) -> None:
    recipe = make.make_recipe(
        "fsdp2", train__eval_every_steps=4, checkpoint__every_steps=4, logging__trackers=["tensorboard"]
    )
    run = make.make_run(tmp_path, recipe)
    assert make.run_attempt(run, 2) == [("finished", 6)] * 2
    steps, evaluations = read_metrics(run.metrics_file)
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) == {
        "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "memory_gib", "data_wait_s", "time",
        "attempt",
    }  # fmt: skip
    assert [e["step"] for e in evaluations] == [0, 4, 6]
    assert run.loss_png.read_bytes().startswith(b"\x89PNG")
    assert read_state(run).status == "finished"
    assert [c.step for c in valid_checkpoints(run)] == [4, 6]
    assert list((run.path / "tensorboard").iterdir())


def test_a_finished_run_started_again_ends_at_once(tmp_path: Path) -> None:
    run = make.make_run(tmp_path, make.make_recipe("ddp"))
    make.run_attempt(run, 1)
    before = run.metrics_file.read_text()
    assert make.run_attempt(run, 1) == [("finished", 6)]
    assert run.metrics_file.read_text() == before
    assert read_state(run).status == "finished"


def rank_that_is_stopped(rank: int, world_size: int, path: str, attempt: int, step: int, how: str) -> None:
    """Run a rank; at `step` the stop is asked for, by the request file or by a signal to rank 0 or to the last rank."""
    import os
    import signal

    from launcher.run.directory import RunDirectory
    from launcher.trainer import loop
    from launcher.trainer.main import run_rank

    original = loop.accumulate

    def hooked(t: Any, rows: Any) -> Any:
        if t.step == step:
            if how == "request" and rank == 0:
                request_stop(RunDirectory(path), "test")
            elif how != "request" and rank == world_size - 1:
                os.kill(os.getpid(), getattr(signal, how))
        return original(t, rows)

    loop.accumulate = hooked  # type: ignore[assignment]
    try:
        run_rank(path, attempt)
    finally:
        loop.accumulate = original


@pytest.mark.parametrize("how", ["request", "SIGTERM", "SIGUSR1"])
def test_l9_a_stop_on_any_rank_ends_all_at_the_same_step_with_a_durable_checkpoint(tmp_path: Path, how: str) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    run = make.make_run(tmp_path, make.make_recipe("ddp"), total_steps=9, evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    run_ranks(rank_that_is_stopped, 2, str(run.path), attempt, 3, how)
    outcomes = read_outcomes(run, attempt)
    assert {o.kind for o in outcomes.values()} == {"stopped"}
    (stopped,) = {o.step for o in outcomes.values()}
    assert stopped == 5  # asked for during the 4th step, agreed while the 5th ran
    assert [c.step for c in valid_checkpoints(run)] == [5]
    assert read_state(run).status == "preempted"
    clear_stop(run)
    assert make.run_attempt(run, 2) == [("finished", 9)] * 2
    assert sorted(losses(run)) == list(range(1, 10))


def test_l4_a_run_stopped_and_resumed_repeats_the_losses_of_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    config = {**make.LLAMA, "attention_dropout": 0.1}  # random numbers are part of it
    whole = make.make_run(tmp_path / "whole", make.make_recipe("fsdp2", config=config), total_steps=8, evaluation=False)
    make.run_attempt(whole, 2)
    run = make.make_run(tmp_path / "cut", make.make_recipe("fsdp2", config=config), total_steps=8, evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    run_ranks(rank_that_is_stopped, 2, str(run.path), attempt, 2, "request")
    clear_stop(run)
    make.run_attempt(run, 2)
    assert losses(run) == losses(whole)


def test_l5_another_number_of_ranks_and_another_engine_go_on_with_the_same_losses(tmp_path: Path) -> None:
    whole = make.make_run(tmp_path / "whole", make.make_recipe("ddp"), total_steps=8, evaluation=False)
    make.run_attempt(whole, 1)
    run = make.make_run(tmp_path / "moved", make.make_recipe("ddp"), total_steps=8, evaluation=False)
    for total, kind, ranks in ((3, "ddp", 2), (6, "fsdp2", 3), (8, "ddp", 1)):
        data = json.loads(run.data_file.read_text())
        run.data_file.write_text(json.dumps({**data, "total_steps": total}))
        from launcher.recipe.schema import to_dict

        run.write_recipe(to_dict(make.make_recipe(kind)))
        assert make.run_attempt(run, ranks) == [("finished", total)] * ranks
    for step, loss in losses(whole).items():
        assert losses(run)[step] == pytest.approx(loss, rel=1e-5)


def rank_with_poison(rank: int, world_size: int, path: str, attempt: int, step: int) -> list[str] | None:
    """Run a rank; at `step` the last rank's loss becomes infinite."""
    from launcher.trainer import loop
    from launcher.trainer.main import run_rank
    from launcher.trainer.model import TrainedModel

    original, accumulate, now = TrainedModel.weighted_nll, loop.accumulate, {"step": -1}

    def watch(t: Any, rows: Any) -> Any:
        now["step"] = t.step
        return accumulate(t, rows)

    def poisoned(self: Any, batch: Any) -> Any:
        loss = original(self, batch)
        return loss + float("inf") if self.training and now["step"] == step and rank == world_size - 1 else loss

    loop.accumulate, TrainedModel.weighted_nll = watch, poisoned  # type: ignore[assignment, method-assign]
    try:
        run_rank(path, attempt)
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        loop.accumulate, TrainedModel.weighted_nll = accumulate, original  # type: ignore[method-assign]
    return None


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_one_step_late_and_says_what_to_do(
    tmp_path: Path, kind: str
) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    run = make.make_run(tmp_path, make.make_recipe(kind), evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    for name, text in run_ranks(rank_with_poison, 2, str(run.path), attempt, 2):
        assert name == "NonFiniteError"
        assert "step 3" in text
        assert "train.on_nonfinite=skip" in text
    assert {o.failure_class for o in read_outcomes(run, attempt).values()} == {"non_finite"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_skip_drops_the_update_on_every_rank_and_goes_on(tmp_path: Path, kind: str) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    run = make.make_run(tmp_path, make.make_recipe(kind, train__on_nonfinite="skip"), evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    assert run_ranks(rank_with_poison, 2, str(run.path), attempt, 2) == [None, None]
    seen = losses(run)
    assert seen[3] is None
    assert all(seen[step] is not None for step in (1, 2, 4, 5, 6))
    (newest,) = valid_checkpoints(run)[-1:]
    manifest = json.loads((newest.path / "manifest.json").read_text())
    assert manifest["trainer_state"]["optimizer_step"] == 5


def rank_without_room(rank: int, world_size: int, path: str, attempt: int) -> str:
    """Run a rank; before the save of step 3 a file takes the place of its folder. What the rank printed."""
    import contextlib
    import io

    from launcher.run.directory import RunDirectory
    from launcher.trainer import loop
    from launcher.trainer.main import run_rank

    original = loop.accumulate

    def hooked(t: Any, rows: Any) -> Any:
        if t.step == 2 and rank == 0:
            RunDirectory(path).checkpoint(3, attempt).write_text("not a folder")
        return original(t, rows)

    loop.accumulate, printed = hooked, io.StringIO()  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(printed):
            run_rank(path, attempt)
    finally:
        loop.accumulate = original
    return printed.getvalue()


def test_a_checkpoint_that_cannot_be_written_is_said_and_does_not_end_the_run(tmp_path: Path) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    run = make.make_run(tmp_path, make.make_recipe("fsdp2", checkpoint__every_steps=3), evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    printed = run_ranks(rank_without_room, 2, str(run.path), attempt)
    assert {(o.kind, o.step) for o in read_outcomes(run, attempt).values()} == {("finished", 6)}
    assert [c.step for c in valid_checkpoints(run)] == [6]
    assert "warning: no checkpoint was written: " in printed[0]


def rank_overtaken(rank: int, world_size: int, path: str, attempt: int) -> str | None:
    """Run a rank; in the third step a newer attempt starts."""
    from launcher.run.directory import RunDirectory
    from launcher.run.ledger import start_attempt
    from launcher.trainer import loop
    from launcher.trainer.main import run_rank

    original = loop.accumulate

    def hooked(t: Any, rows: Any) -> Any:
        if t.step == 2:
            start_attempt(RunDirectory(path), target="test", job_id=None, nodes=["elsewhere"], reason="test")
        return original(t, rows)

    loop.accumulate, loop.STATE_EVERY_S = hooked, 0.0  # type: ignore[assignment]
    try:
        run_rank(path, attempt)
    except Exception as error:
        return type(error).__name__
    finally:
        loop.accumulate, loop.STATE_EVERY_S = original, 3.0
    return None


def test_l11_an_attempt_that_a_newer_one_has_overtaken_stops_writing(tmp_path: Path) -> None:
    from launcher.run.ledger import start_attempt
    from tests.ranks import run_ranks

    run = make.make_run(tmp_path, make.make_recipe("ddp"), evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    assert run_ranks(rank_overtaken, 1, str(run.path), attempt) == ["StaleAttempt"]
    outcome = read_outcomes(run, attempt)[0]
    assert (outcome.kind, outcome.failure_class, outcome.step) == ("failed", "node", 3)
    assert valid_checkpoints(run) == []
