"""`launcher submit` of torchrun and accelerate, with real ranks: killed and started again, stopped, cancelled.

All of them are compared bit by bit with a run that `launcher run` trained without an interruption.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.jobs.submissions import latest
from launcher.jobs.targets.process import cancel, status
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import reached_end
from tests.jobs.make import descendants, finish, launcher, losses, project, run_of, tensors_of, until

pytestmark = [pytest.mark.gloo, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 60
PATIENCE_S = 400  # a busy machine


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Iterator[Path]:
    """A project; no job of its runs outlives the tests."""
    changes = {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": 20, "async_save": False}}
    recipe = project(tmp_path_factory.mktemp("background"), **changes)
    yield recipe
    for run in (recipe.parent / "runs").iterdir():
        if (job := latest(run)) is not None and status(job).state in ("starting", "running"):
            cancel(job)
            ended(RunDirectory(run))


@pytest.fixture(scope="module")
def whole(recipe) -> RunDirectory:
    finish(launcher("run", recipe, "run.name=whole"), code=0, timeout_s=PATIENCE_S)
    return run_of(recipe, "whole")


def assert_same_training(run: RunDirectory, whole: RunDirectory) -> None:
    assert losses(run) == losses(whole)
    assert len(losses(run)) == STEPS
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)


def submitted(recipe: Path, name: str, *more: str) -> tuple[RunDirectory, int]:
    """A run in the background in the midst of its steps, and the process id of its script."""
    finish(launcher("submit", recipe, f"run.name={name}", *more), code=0)
    run = run_of(recipe, name)
    job = latest(run.path)
    assert job is not None
    over = ("finished", "failed", "cancelled")
    until("some steps", lambda: len(losses(run)) >= 5 or status(job).state in over, timeout_s=PATIENCE_S)
    assert status(job).state == "running", status(job)
    return run, int(job.more["pid"])


def ended(run: RunDirectory) -> str:
    """The state of the last job once it is over."""
    job = latest(run.path)
    assert job is not None
    until("the end", lambda: status(job).state not in ("starting", "running"), timeout_s=PATIENCE_S)
    return status(job).state


def rank_of(script: int) -> int:
    """A process that trains, below a job's script."""

    def trains(pid: int) -> bool:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"launcher.trainer" in command and b"--" not in command and not any(b"torchrun" in w for w in command)

    return next(pid for pid in sorted(descendants(script)) if trains(pid))


def test_a_job_with_a_killed_rank_is_started_again_by_its_class_and_repeats_the_uninterrupted_run(recipe, whole):
    run, script = submitted(recipe, "killed")
    os.kill(rank_of(script), signal.SIGKILL)
    assert ended(run) == "finished"
    assert_same_training(run, whole)
    first, second = attempts(run)
    assert first.end_class in ("unknown", "communication")  # as the other rank speaks before its end or not
    assert (first.end_verdict, first.restart) == ("requeue", 0)
    assert (second.end_class, second.restart, second.job_id) == ("finished", 1, first.job_id)
    assert {first.target, second.target} == {"torchrun"}
    out, _ = finish(launcher("status", run.path, "--history"), code=0)
    assert re.search(rf"{first.end_class} +requeue", out)


def test_a_job_that_is_told_to_stop_ends_with_75_and_the_next_submission_goes_on_exactly(recipe, whole):
    run, script = submitted(recipe, "stopped", "--target", "accelerate")
    waiting = launcher("submit", run.path)  # while it runs
    _, err = finish(waiting, code=2)
    assert "accelerate job" in err
    assert "is running" in err
    os.kill(script, signal.SIGTERM)
    assert ended(run) == "cancelled"
    assert [attempt.end_class for attempt in attempts(run)] == ["preemption"]
    out, _ = finish(launcher("submit", run.path, "--wait"), code=0, timeout_s=PATIENCE_S)
    assert "finished" in out
    assert_same_training(run, whole)
    out, _ = finish(launcher("logs", run.path, "--job"), code=0)
    assert f"step {STEPS}/{STEPS}" in out


def test_cancel_checkpoints_and_is_for_good(recipe):
    run, script = submitted(recipe, "cancelled", "train.max_steps=100000")
    out, _ = finish(launcher("cancel", run.path), code=0)
    assert "asked to end; it does not come back" in out
    assert ended(run) == "cancelled"
    (attempt,) = attempts(run)
    assert (attempt.end_class, attempt.end_verdict) == ("cancelled", "stop")
    assert valid_checkpoints(run)[-1].step == attempt.end_step
    assert not descendants(script)


def test_a_killed_script_leaves_a_worker_that_is_the_job_to_every_command(recipe):
    run, script = submitted(recipe, "orphan", "train.max_steps=100000")
    os.kill(script, signal.SIGKILL)
    job = latest(run.path)
    assert job is not None
    until("the script's end", lambda: "its script was killed" in status(job).reason)
    summary = json.loads(finish(launcher("status", run.path, "--json"), code=0)[0])
    assert (summary["status"], summary["job"]["state"]) == ("running", "running")
    assert "is running (its script was killed" in finish(launcher("submit", run.path), code=2)[1]
    finish(launcher("cancel", run.path), code=0)
    assert ended(run) == "cancelled"
    assert attempts(run)[0].end_class == "cancelled"


def test_wait_ends_with_2_for_a_mistake_in_the_data(recipe):
    bad = recipe.parent / "bad.jsonl"
    bad.write_text('{"messages": 7}\n')
    done = launcher("submit", recipe, "run.name=bad", f"data.train=[{{path: {bad}, format: messages}}]", "--wait")
    out, err = done.communicate(timeout=PATIENCE_S)
    assert done.returncode in (1, 2), f"{out}{err}"
    assert "failed" in out


def test_the_scripts_of_two_nodes_train_as_one_node_does(recipe, whole, tmp_path):
    job = tmp_path / "job"
    asked = ("run.name=pair", "cluster.nodes=2", "cluster.nproc_per_node=1")
    finish(launcher("render", recipe, *asked, "--target", "torchrun", "-o", job), code=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "LAUNCHER_RENDEZVOUS": f"127.0.0.1:{port}"}
    nodes = [
        subprocess.Popen(["bash", f"node-{i}.sh"], cwd=job, env=environment, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    for node in nodes:
        _, err = node.communicate(timeout=500)
        assert node.returncode == 0, err
    run = run_of(recipe, "pair")
    assert reached_end(run)
    assert losses(run) == losses(whole)
    assert json.loads(run.ledger_file.read_text().splitlines()[0])["target"] == "torchrun"
