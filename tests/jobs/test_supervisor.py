"""What the supervisor decides without starting a rank: stop requests, stale attempts, fresh runs with a mistake."""

from __future__ import annotations

import json
import time

import pytest

from launcher.jobs.ending import Ending
from launcher.jobs.opening import discard_if_fresh
from launcher.jobs.signals import Signals
from launcher.jobs.supervisor import _pass_on_stop, conclude
from launcher.run.control import read_verdict, stop_reason, stop_requested
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, start_attempt
from launcher.run.state import reached_end, read_state, write_state


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "r")
    made.create({}, {}, {})
    start_attempt(made, target="local", job_id=None, nodes=["here"], reason="run")
    return made


def test_the_time_limit_becomes_a_stop_request_once(run):
    signals, said = Signals(), []
    _pass_on_stop(run, signals, time.monotonic() + 3600, said.append)
    assert not stop_requested(run)
    for _ in range(3):
        _pass_on_stop(run, signals, time.monotonic() - 1, said.append)
    assert stop_reason(run) == "time limit"
    assert len(said) == 1


def test_a_signal_becomes_a_stop_request_with_its_name(run):
    signals = Signals()
    signals.stop = "SIGUSR1"
    _pass_on_stop(run, signals, None, lambda text: None)
    assert stop_reason(run) == "SIGUSR1"


def test_l11_a_superseded_attempt_writes_neither_state_nor_verdict(run):
    start_attempt(run, target="local", job_id=None, nodes=["elsewhere"], reason="run")
    write_state(run, "running", attempt=2, step=5)
    conclude(run, 1, Ending(status="failed", failure_class="communication", step=3))
    assert (read_state(run).attempt, read_state(run).step, read_verdict(run)) == (2, 5, None)
    assert attempts(run)[0].end_class == "communication"


def test_ranks_that_died_without_a_word_leave_state_failed(run):
    write_state(run, "running", attempt=1, step=5)
    conclude(run, 1, Ending(status="failed", failure_class="unknown", step=5, message="killed"))
    state = read_state(run)
    assert (state.status, state.step, state.more["message"], read_verdict(run)) == ("failed", 5, "killed", "stop")


@pytest.mark.parametrize(("total_steps", "over"), [(5, True), (8, False)])
def test_a_finished_run_whose_data_were_prepared_for_more_steps_is_not_over(run, total_steps, over):
    write_state(run, "finished", attempt=1, step=5)
    assert not reached_end(run)  # nothing is prepared
    run.data_file.write_text(json.dumps({"total_steps": total_steps}))
    assert reached_end(run) is over


def test_only_a_first_attempt_that_learnt_nothing_is_discarded(run):
    run.metrics_file.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    discard_if_fresh(run, 1)
    assert run.exists()
    run.metrics_file.unlink()
    discard_if_fresh(run, 2)
    assert run.exists()
    discard_if_fresh(run, 1)
    assert not run.path.exists()
