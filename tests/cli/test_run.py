"""`launcher run` as a person meets it: real processes, real signals, real kills (gloo ranks on the CPU)."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from launcher.run.control import read_verdict
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.jobs.make import descendants, finish, launcher, lives, losses, project, ranks_of, run_of, tensors_of, until

pytestmark = pytest.mark.gloo

STEPS = 160
LONG = {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": 20, "async_save": True}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return project(tmp_path_factory.mktemp("project"), **LONG)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> RunDirectory:
    finish(launcher("run", recipe, "run.name=whole"), code=0)
    return run_of(recipe, "whole")


def assert_same_training(run: RunDirectory, whole: RunDirectory) -> None:
    """L4: losses, gradient norms, weights and moments equal bit by bit."""
    assert losses(run) == losses(whole)
    assert len(losses(run)) == STEPS
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def running(recipe: Path, name: str, *changes: str, **more: Any):
    """A run of that name in the middle of its steps, with its ranks' process ids."""
    process = launcher("run", recipe, f"run.name={name}", *changes, **more)
    run = run_of(recipe, name)
    until("some steps", lambda: len(losses(run)) >= 5 or process.poll() is not None)
    ranks = ranks_of(process.pid)
    assert process.poll() is None, process.communicate()
    assert len(ranks) == 2
    return process, run, ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_l4_l9_a_stop_signal_ends_with_75_and_resume_repeats_the_uninterrupted_run(recipe, uninterrupted, number):
    name = f"stopped-{number.name.lower()}"
    process, run, ranks = running(recipe, name)
    os.killpg(process.pid, number)  # as a terminal does: to the whole process group
    out, _ = finish(process, code=75, timeout_s=60)
    assert "launcher resume" in out
    assert (read_state(run).status, read_verdict(run), attempts(run)[-1].end_class) == (
        "preempted",
        "requeue",
        "preemption",
    )
    assert not [pid for pid in ranks if lives(pid)]

    finish(launcher("resume", run.path), code=0)
    assert len(attempts(run)) == 2
    assert_same_training(run, uninterrupted)


def test_a_closing_terminal_stops_the_run_with_75_and_no_helper_process_complains(recipe):
    process, _, ranks = running(recipe, "hung-up")
    os.killpg(process.pid, signal.SIGHUP)
    _, err = finish(process, code=75, timeout_s=60)
    assert err == ""
    assert not [pid for pid in ranks if lives(pid)]


@pytest.fixture
def short_folder():
    """A temporary folder whose path leaves room for a socket's name; pytest's own may not."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as name:
        yield Path(name)


def test_a_temporary_folder_too_deep_for_sockets_is_passed_over(recipe, tmp_path):
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    finish(launcher("run", recipe, "run.name=deep", "train.max_steps=2", env={"TMPDIR": str(deep)}), code=0)


def test_a_run_leaves_nothing_in_the_temporary_folder_and_the_next_start_removes_what_a_kill_left(recipe, short_folder):
    def left() -> set[str]:  # torch keeps one cache there for all runs
        return {path.name for path in short_folder.iterdir() if not path.name.startswith("torchinductor_")}

    own, others = {"TMPDIR": str(short_folder)}, "launcher-of-somebody-else"
    (short_folder / others).mkdir()
    finish(launcher("run", recipe, "run.name=tidy", "train.max_steps=2", env=own), code=0)
    assert left() == {others}
    finish(launcher("run", recipe, "run.name=tidy-failed", "optimizer.lr=1e30", env=own), code=1)
    assert left() == {others}
    process, _, _ = running(recipe, "untidy", "train.max_steps=100000", env=own)
    process.kill()
    process.communicate()
    assert len(left()) == 2
    finish(launcher("run", recipe, "run.name=tidier", "train.max_steps=2", env=own), code=0)
    assert left() == {others}


def test_l4_a_killed_rank_is_named_and_the_run_goes_on_by_itself_bit_exact(recipe, uninterrupted):
    process, run, ranks = running(recipe, "killed", "cluster.restart.backoff_s=0")
    os.kill(ranks[1], signal.SIGKILL)
    out, _ = finish(process, code=0)
    assert "killed by SIGKILL" in out
    assert "unknown: restart 1 of 3 (cluster.restart.unknown): attempt 2 begins now" in out
    assert not [pid for pid in ranks if lives(pid)]
    assert (read_state(run).status, read_verdict(run)) == ("finished", "stop")
    first, second = attempts(run)
    assert (first.end_class, first.end_again, second.within, second.job_id) == ("unknown", True, True, first.job_id)
    assert_same_training(run, uninterrupted)


def test_without_a_budget_a_killed_rank_ends_the_run_with_1_and_the_next_start_is_a_persons(recipe, uninterrupted):
    process, run, ranks = running(recipe, "left", "cluster.restart.unknown=0")
    os.kill(ranks[1], signal.SIGKILL)
    out, _ = finish(process, code=1, timeout_s=25)  # not torch's 30 s
    assert "killed by SIGKILL" in out
    assert not [pid for pid in ranks if lives(pid)]
    assert (read_state(run).status, read_verdict(run)) == ("failed", "stop")

    finish(launcher("run", recipe, "run.name=left"), code=0)
    assert_same_training(run, uninterrupted)


def test_killing_the_launcher_leaves_no_process_behind_and_its_lease_is_taken_over(recipe, uninterrupted):
    process, run, _ = running(recipe, "orphaned")
    below = descendants(process.pid)
    assert len(below) >= 3  # fork server and two ranks
    process.kill()
    process.wait()
    until("all processes gone", lambda: not [pid for pid in below if lives(pid)], timeout_s=10)
    assert read_verdict(run) is None
    finish(launcher("run", recipe, "run.name=orphaned"), code=0)
    assert_same_training(run, uninterrupted)


def test_l11_a_second_start_of_a_live_run_is_refused_and_the_first_goes_on(recipe, uninterrupted):
    process, run, _ = running(recipe, "twice")
    _, err = finish(launcher("run", recipe, "run.name=twice"), code=2)
    assert str(process.pid) in err
    finish(process, code=0)
    assert len(attempts(run)) == 1
    assert_same_training(run, uninterrupted)


def test_a_second_ctrl_c_ends_at_once_asks_for_no_other_start_and_says_what_is_lost(recipe):
    process, run, ranks = running(recipe, "hurry", "train.max_steps=100000", "checkpoint.every_steps=null")
    os.kill(ranks[0], signal.SIGSTOP)  # so that the stop cannot come about by itself
    process.send_signal(signal.SIGINT)
    until("the request", lambda: (run.control / "stop-request").exists())
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, code=1, timeout_s=30)
    until("all ranks gone", lambda: not [pid for pid in ranks if lives(pid)], timeout_s=10)
    assert "the work since the last checkpoint is lost" in out
    assert (attempts(run)[-1].end_class, read_state(run).status, read_verdict(run)) == ("unknown", "failed", "stop")


def test_a_finished_run_says_so_and_does_nothing(recipe, uninterrupted):
    before = contents(uninterrupted.path)
    out, _ = finish(launcher("run", recipe, "run.name=whole"), code=0)
    assert "is finished" in out
    after = contents(uninterrupted.path)
    after["control/lease"] = before["control/lease"]
    assert after == before


def test_a_change_of_identity_is_refused_and_nothing_written(recipe, uninterrupted):
    before = contents(uninterrupted.path)
    _, err = finish(launcher("run", recipe, "run.name=whole", "train.seed=1", "data.seq_len=64"), code=2)
    assert "train.seed: 0 -> 1" in err
    assert "data.seq_len: 128 -> 64" in err
    assert "--force" in err
    after = contents(uninterrupted.path)
    after["control/lease"] = before["control/lease"]
    assert after == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.config.hidden_size=64", "train.max_steps=200", "--force"], ["model.config.hidden_size: 32 -> 64"]),
        (["model.dtype=bf16", "train.precision=auto", "--force"], ["model.dtype", "run.name="]),
        (["train.max_steps=10", "--force"], ["train.max_steps = 10", f"{STEPS} steps"]),
        (["run.name=other"], ["run.name", "move the directory"]),
        (["run.dir=/elsewhere", "--force"], ["run.dir", "move the directory"]),
    ],
)
def test_what_the_checkpoints_cannot_take_is_refused_even_with_force_and_nothing_written(
    recipe, uninterrupted, changes, words
):
    before = contents(uninterrupted.path)
    _, err = finish(launcher("resume", uninterrupted.path, *changes), code=2)
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    after = contents(uninterrupted.path)
    after["control/lease"] = before["control/lease"]
    assert after == before


def test_resume_lists_each_changed_key_and_a_finished_run_can_be_lengthened(recipe):
    finish(launcher("run", recipe, "run.name=short", "train.max_steps=4"), code=0)
    run = run_of(recipe, "short")
    changes = ["train.max_steps=6", "optimizer.lr=0.001"]
    _, err = finish(launcher("resume", run.path, *changes), code=2)
    assert "optimizer.schedule_steps=4: goes on with the old one: 0 at step 5" in err
    out, _ = finish(launcher("resume", run.path, *changes, "optimizer.schedule_steps=6"), code=0)
    assert "changed train.max_steps: 4 -> 6: moves the end of the run" in out
    assert "changed optimizer.lr: 0.01 -> 0.001: applies from step 5 on" in out
    assert "learning rate of step 5: 0 -> " in out
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert json.loads(run.data_file.read_text())["total_steps"] == 6
    assert run.read_recipe()["optimizer"]["lr"] == 0.001


def test_force_goes_on_with_other_data(recipe):
    finish(launcher("run", recipe, "run.name=forced", "train.max_steps=4"), code=0)
    changes = ["train.max_steps=6", "optimizer.schedule_steps=6", "data.train_on=all"]
    finish(launcher("resume", run_of(recipe, "forced").path, *changes), code=2)
    finish(launcher("resume", run_of(recipe, "forced").path, *changes, "--force"), code=0)
    assert sorted(losses(run_of(recipe, "forced"))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["cluster.accelerator=cuda"], ["accelerator=cpu"]),
        (["cluster.env=[NOT_SET_ANYWHERE]"], ["NOT_SET_ANYWHERE", "not set"]),
        (["cluster.env=[NOT_SET_ANYWHERE]", "cluster.setup=['true']"], ["cluster.setup has run without exporting"]),
        (["cluster.setup=['echo no such module >&2; exit 4']"], ["cluster.setup failed with 4", "no such module"]),
        (["cluster.nodes=2"], ["launcher run RECIPE --node-rank I --rendezvous HOST:PORT"]),
        (["run.dir=/proc/nowhere"], ["/proc/nowhere", "cannot be written"]),
    ],
)
def test_what_this_machine_lacks_is_said_with_code_2_and_nothing_written(recipe, changes, words, tmp_path):
    arguments = [f"run.dir={tmp_path}/runs", *changes]
    _, err = finish(launcher("run", recipe, *arguments, env={"CUDA_VISIBLE_DEVICES": ""}), code=2)
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_data_is_said_with_code_2_and_the_run_is_gone_again(recipe, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "only"}\n')
    arguments = [f"run.dir={tmp_path}/runs", f"data.train=[{{path: {tmp_path}/bad.jsonl}}]"]
    _, err = finish(launcher("run", recipe, *arguments), code=2)
    assert "bad.jsonl" in err
    assert "Traceback" not in err
    assert "resource_tracker" not in err
    assert not (tmp_path / "runs").exists()


def test_a_row_that_is_too_long_is_said_in_one_message_and_preparation_leaves_no_semaphore(recipe, tmp_path):
    arguments = [f"run.dir={tmp_path}/runs", "data.seq_len=16", "data.overlong=error"]
    _, err = finish(launcher("run", recipe, *arguments), code=2)
    assert "data.seq_len" in err
    assert "Traceback" not in err
    assert "resource_tracker" not in err


def test_a_run_that_is_not_finite_is_named_with_its_class_and_every_rank_keeps_its_log(recipe):
    arguments = ["run.name=infinite", "optimizer.lr=1e30", "train.max_grad_norm=null"]
    out, _ = finish(launcher("run", recipe, *arguments), code=1)
    assert "Traceback" not in out
    assert "non_finite" in out
    run = run_of(recipe, "infinite")
    assert (attempts(run)[-1].end_class, read_verdict(run)) == ("non_finite", "stop")
    logs = run.path / "logs" / "attempt-1"
    assert {file.name for file in logs.glob("*/[01].log")} == {"0.log", "1.log"}
