"""What a pod of a Ray cluster does before it goes: the run is asked for a checkpoint, and waited for."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.jobs.prestop import main
from launcher.run.control import CANCEL, request_stop, stop_reason, stop_requested
from launcher.run.directory import RunDirectory
from launcher.run.lease import hold_lease
from launcher.run.ledger import end_attempt, start_attempt
from tests.jobs.make import until


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "r")
    made.create({}, {}, {})
    return made


def begun(run: RunDirectory) -> int:
    return start_attempt(run, target="ray", job_id="r-1", nodes=["a"], reason="worker", restart=0)


def test_an_attempt_that_trains_is_asked_to_stop_and_waited_for(run: RunDirectory):
    with hold_lease(run):
        attempt = begun(run)
        hook = threading.Thread(target=main, args=(run,))
        hook.start()
        until("the request", lambda: stop_requested(run))
        assert hook.is_alive()
        end_attempt(run, attempt, step=3, outcome_class="preemption")
        hook.join(30)
        assert not hook.is_alive()
    assert str(stop_reason(run)).endswith("is being ended")


def test_it_waits_no_longer_than_it_is_told(run: RunDirectory):
    with hold_lease(run):
        begun(run)
        assert main(run, 0.1) is True


def test_a_run_that_has_ended_is_not_asked(run: RunDirectory):
    with hold_lease(run):
        end_attempt(run, begun(run), step=3, outcome_class="finished")
        assert main(run) is False
    assert not stop_requested(run)


def test_a_run_whose_launcher_is_gone_holds_no_pod(run: RunDirectory):
    with hold_lease(run):
        begun(run)
    assert main(run) is False
    assert not stop_requested(run)


def test_a_cancel_stays_one(run: RunDirectory):
    with hold_lease(run):
        begun(run)
        request_stop(run, f"{CANCEL} by ann")
        main(run, 0.1)
    assert str(stop_reason(run)).startswith(CANCEL)


def test_a_run_that_was_never_made_is_nothing_to_wait_for(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "launcher.jobs.prestop", str(tmp_path / "none"), "5"], check=False)
    assert done.returncode == 0
    assert not (tmp_path / "none").exists()
