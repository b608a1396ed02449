"""State and control files: what an older attempt writes never counts (L11)."""

from __future__ import annotations

import json
import os
import signal

import pytest

from launcher.run import control
from launcher.run.control import Outcome
from launcher.run.ledger import StaleAttempt, end_attempt
from launcher.run.state import read_state, write_state
from tests.run.make import Script, make_run, start


def test_state_of_the_latest_attempt_comes_back_with_its_further_fields(tmp_path):
    run = make_run(tmp_path)
    write_state(run, "running", attempt=start(run), step=4, total_steps=9, loss=2.5)
    state = read_state(run)
    assert (state.status, state.attempt, state.step, state.more) == ("running", 1, 4, {"total_steps": 9, "loss": 2.5})


def test_state_before_any_word_comes_from_the_ledger(tmp_path):
    run = make_run(tmp_path)
    assert read_state(run).status == "queued"
    start(run)
    assert read_state(run).status == "starting"


@pytest.mark.parametrize(
    ("outcome_class", "status"),
    [
        (None, "finished"), ("finished", "finished"), ("preemption", "preempted"), ("stopped", "preempted"),
        ("hang", "failed"), ("later", "failed"),
    ],
)  # fmt: skip
def test_end_line_tells_the_state_when_no_rank_did(tmp_path, outcome_class, status):
    run = make_run(tmp_path)
    end_attempt(run, start(run), step=6, outcome_class=outcome_class)
    assert (read_state(run).status, read_state(run).step) == (status, 6)


def test_running_is_over_once_the_attempt_has_ended(tmp_path):
    run = make_run(tmp_path)
    write_state(run, "running", attempt=start(run), step=4)
    end_attempt(run, 1, step=5, outcome_class="node")
    assert (read_state(run).status, read_state(run).step) == ("failed", 5)


def test_stale_writer_is_refused_and_changes_nothing_l11(tmp_path):
    run = make_run(tmp_path)
    start(run)
    start(run)
    write_state(run, "running", attempt=2, step=1)
    before = run.state_file.read_bytes()
    with pytest.raises(StaleAttempt):
        write_state(run, "finished", attempt=1, step=99)
    with pytest.raises(StaleAttempt):
        control.write_verdict(run, "stop", attempt=1)
    assert run.state_file.read_bytes() == before
    assert control.read_verdict(run) is None


def test_writer_stopped_and_continued_after_a_newer_start_is_refused_l11(tmp_path):
    """L11 with real processes: a writer that slept through the change of attempts hears of it at its next word."""
    run = make_run(tmp_path)
    start(run)
    code = (
        "from launcher.run.state import write_state, StaleAttempt\nwrite_state(run, 'running', attempt=1, step=1)\n"
        "say('ready'); hear()\n"
        "try: write_state(run, 'finished', attempt=1, step=99); say('written')\nexcept StaleAttempt: say('stale')"
    )
    with Script(run, code) as writer:
        assert writer.heard() == "ready"
        os.kill(writer.pid, signal.SIGSTOP)
        start(run)
        write_state(run, "running", attempt=2, step=2)
        os.kill(writer.pid, signal.SIGCONT)
        writer.tell()
        assert writer.heard() == "stale"
    assert (read_state(run).attempt, read_state(run).step) == (2, 2)


def test_stale_state_that_slipped_past_the_check_never_counts_l11(tmp_path):
    """L11 with real processes: stopped between its check and its write, across the start of a newer attempt."""
    run = make_run(tmp_path)
    start(run)
    code = (
        "import launcher.run.state as state\nreal = state.write_atomic\n"
        "def late(*a, **k): say('checked'); hear(); real(*a, **k); say('written')\n"
        "state.write_atomic = late\nstate.write_state(run, 'finished', attempt=1, step=99)"
    )
    with Script(run, code) as writer:
        assert writer.heard() == "checked"
        os.kill(writer.pid, signal.SIGSTOP)
        from launcher.run.ledger import ledger_lock

        with ledger_lock(run, wait_s=0.05):  # as start_attempt does after its wait
            pass
        assert start(run) == 2
        write_state(run, "running", attempt=2, step=2)
        os.kill(writer.pid, signal.SIGCONT)
        writer.tell()
        assert writer.heard() == "written"
    assert json.loads(run.state_file.read_text())["attempt"] == 1  # it did slip in
    assert (read_state(run).status, read_state(run).attempt) == ("starting", 2)
    end_attempt(run, 2, step=3, outcome_class="preemption")
    assert (read_state(run).status, read_state(run).attempt, read_state(run).step) == ("preempted", 2, 3)


def test_damaged_state_reads_as_none(tmp_path):
    run = make_run(tmp_path)
    start(run)
    for text in ("", "{", "[]", '{"status": "running"}', '{"status": "odd", "attempt": 1}'):
        run.state_file.write_text(text)
        assert read_state(run).status == "starting"


def test_unknown_status_is_our_own_mistake(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match="expected one of running, preempted, finished, failed"):
        write_state(run, "done", attempt=start(run), step=1)


def test_stop_request_comes_from_here_or_from_touch_and_can_be_cleared(tmp_path):
    run = make_run(tmp_path)
    assert not control.stop_requested(run)
    assert control.stop_reason(run) is None
    control.request_stop(run, "time limit")
    assert control.stop_requested(run)
    assert control.stop_reason(run) == "time limit"
    control.clear_stop(run)
    control.clear_stop(run)
    assert not control.stop_requested(run)
    (run.control / "stop-request").touch()
    assert control.stop_reason(run) == ""


def test_outcomes_are_of_one_attempt_each(tmp_path):
    run = make_run(tmp_path)
    failed = Outcome("failed", "data", 3, "rank 1, step 3: bad", "Traceback", "n1")
    control.write_outcome(run, 1, 1, failed)
    control.write_outcome(run, 11, 0, Outcome("finished", step=9))
    assert control.read_outcomes(run, 1) == {1: failed}
    assert control.read_outcomes(run, 11) == {0: Outcome("finished", step=9)}
    assert control.read_outcomes(run, 2) == {}


def test_outcome_of_a_later_version_reads_as_unknown(tmp_path):
    run = make_run(tmp_path)
    control.write_outcome(run, 1, 0, Outcome("failed", "data"))
    path = run.control / "outcome" / "1-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failure_class": "cosmic_ray", "further": 1}))
    assert control.read_outcomes(run, 1)[0].failure_class == "unknown"


def test_outcome_refuses_words_outside_the_contract():
    with pytest.raises(ValueError, match="expected one of finished, stopped, failed"):
        Outcome("ended")
    with pytest.raises(ValueError, match="failure_class 'oom'"):
        Outcome("failed", "oom")


def test_first_failure_is_a_cause_before_a_consequence():
    outcomes = {
        0: Outcome("failed", "communication"), 1: Outcome("finished"), 2: Outcome("failed", "data"),
        3: Outcome("failed", "user"),
    }  # fmt: skip
    assert control.first_failure(outcomes) == (2, outcomes[2])
    assert control.first_failure({0: outcomes[0], 1: outcomes[1]}) == (0, outcomes[0])
    assert control.first_failure({1: outcomes[1]}) is None
