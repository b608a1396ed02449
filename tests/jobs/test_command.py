"""An attempt whose ranks a command starts: judged by what the ranks said, told when they said nothing, tied to us."""

from __future__ import annotations

import sys

import pytest

from launcher.run.control import read_verdict
from launcher.run.ledger import attempts
from launcher.run.state import read_state
from tests.jobs.make import descendants, finish, launcher, lives, project, run_of, until

pytestmark = pytest.mark.gloo

JOB = {"LAUNCHER_TARGET": "slurm", "LAUNCHER_JOB_ID": "12"}
SAY = (
    "import os, sys; from launcher.run.control import Outcome, write_outcome as w\n"
    "from launcher.run.directory import RunDirectory as R\n"
    "[w(R(sys.argv[1]), int(os.environ['LAUNCHER_ATTEMPT']), i, Outcome(*eval(sys.argv[2]))) for i in (0, 1)]"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    budgets = {"no_progress": 9}  # no start here writes a checkpoint
    return project(tmp_path_factory.mktemp("command"), cluster={"restart": budgets})


def worker(recipe, *command: str, name: str = "tiny", restart: int = 0, **more):
    where = ["worker", run_of(recipe, name).path, "--recipe", recipe, "--", *command]
    return launcher(*where, env={**JOB, "LAUNCHER_JOB_RESTART": str(restart)}, **more)


def test_a_command_that_is_not_there_is_refused_before_anything_is_written(recipe):
    _, err = finish(worker(recipe, "srnu", "-N2", name="never"), code=2)
    assert "-- srnu: expected a command that starts the ranks" in err
    assert not run_of(recipe, "never").path.joinpath("recipe.yaml").exists()


def test_what_the_ranks_said_decides_and_a_command_that_said_nothing_is_told(recipe):
    run = run_of(recipe)
    out, _ = finish(worker(recipe, "sh", "-c", "exit 3"), code=75)
    assert "rank 0 ended without a word; the command ended with exit code 3: sh -c 'exit 3'" in out
    assert (attempts(run)[0].end_class, read_verdict(run)) == ("unknown", "requeue")

    stopped = ("stopped", None, 4)
    finish(worker(recipe, sys.executable, "-c", SAY, str(run.path), str(stopped), restart=1), code=75)
    last = attempts(run)[-1]
    assert (last.job_id, last.restart, last.end_class, last.end_step) == ("12", 1, "preemption", 4)

    mistake = ("failed", "user", 4, "train.x = 1: expected 2")
    _, err = finish(worker(recipe, sys.executable, "-c", SAY, str(run.path), str(mistake), restart=2), code=2)
    assert "train.x = 1: expected 2" in err
    assert (read_state(run).status, read_verdict(run)) == ("failed", "stop")


def test_the_command_does_not_outlive_a_killed_worker(recipe):
    process = worker(recipe, "sleep", "1000", restart=3)
    found = until("the command", lambda: _named(process.pid, "sleep"), timeout_s=120)
    process.kill()
    process.communicate()
    until("its end", lambda: not lives(found))
    assert read_verdict(run_of(recipe)) is None


def test_a_signal_becomes_a_stop_request_and_the_command_is_left_alone(recipe):
    run = run_of(recipe, "asked")
    wait = "until test -e $0/control/stop-request; do sleep 0.1; done; exec "
    said = [sys.executable, "-c", SAY, str(run.path), str(("stopped", None, 5))]
    process = worker(recipe, "sh", "-c", f'{wait}"$@"', str(run.path), *said, name="asked")
    until("the command", lambda: _named(process.pid, "sh") or process.poll() is not None, timeout_s=240)
    process.terminate()
    out, _ = finish(process, code=75)
    assert "SIGTERM: the run stops after a checkpoint" in out
    assert attempts(run)[-1].end_step == 5


def _named(parent: int, name: str) -> int | None:
    for pid in descendants(parent):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == name:
                    return pid
        except OSError:
            continue
    return None
