"""What the supervisor decides without starting a rank: stop requests, stale attempts, fresh runs with a mistake."""

from __future__ import annotations

import io
import json
import time

import pytest

from launcher.jobs import supervisor
from launcher.jobs.console import Console
from launcher.jobs.ending import Ending
from launcher.jobs.opening import discard_if_fresh
from launcher.jobs.signals import Signals
from launcher.jobs.supervisor import conclude, pass_on_stop
from launcher.recipe.schema import Recipe
from launcher.run.control import read_verdict, request_stop, stop_reason, stop_requested
from launcher.run.directory import RunDirectory
from launcher.run.lease import hold_lease
from launcher.run.ledger import attempts, start_attempt
from launcher.run.reserve import keep_back
from launcher.run.state import reached_end, read_state, write_state


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "r")
    made.create({}, {}, {})
    start_attempt(made, target="local", job_id=None, nodes=["here"], reason="run")
    return made


def test_the_time_limit_becomes_a_stop_request_once(run):
    signals, said = Signals(), []
    pass_on_stop(run, signals, time.monotonic() + 3600, said.append)
    assert not stop_requested(run)
    for _ in range(3):
        pass_on_stop(run, signals, time.monotonic() - 1, said.append)
    assert stop_reason(run) == "time limit"
    assert len(said) == 1


def test_a_signal_becomes_a_stop_request_with_its_name(run):
    signals = Signals()
    signals.stop = "SIGUSR1"
    pass_on_stop(run, signals, None, lambda text: None)
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
    assert (state.status, state.step, state.more["message"], read_verdict(run)) == ("failed", 5, "killed", "requeue")


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


def test_a_stop_while_the_data_is_prepared_has_no_checkpoint_and_says_that_nothing_was_lost(run, monkeypatch):
    def stopped(*_, **__):
        raise supervisor.StopAsked

    monkeypatch.setattr(supervisor, "is_prepared", lambda *_: False)
    monkeypatch.setattr(supervisor, "prepare_in_child", stopped)
    write_state(run, "running", attempt=1, step=None)
    signals, said = Signals(), io.StringIO()
    signals.stop = "SIGTERM"
    ending = supervisor.prepared(run, Recipe(), Console(said), signals)
    conclude(run, 1, ending)
    supervisor.tell(run, 1, ending, Console(said))
    assert (ending.exit_code, read_verdict(run)) == (75, "requeue")
    assert "stopped before the first step; nothing was lost" in said.getvalue()
    assert json.loads(run.state_file.read_text())["status"] == "preempted"


def test_what_preparing_found_is_said_before_any_rank_starts(run, monkeypatch):
    train = {"name": "a", "dropped": {"empty": 2}, "changed": {"truncated to seq_len": 1}, "groups": {"plain": 9}}
    held = {"name": "held", "dropped": {}, "changed": {}, "groups": {"plain": 3, "pairs": 1}}
    data = {
        "version": 2, "leaked": {"held": 1},
        "train": {"sources": [train], "warnings": ["a.jsonl: odd"], "duplicates": 4, "groups": {"plain": 9}},
        "eval": {"sets": [held], "warnings": []},
    }  # fmt: skip
    monkeypatch.setattr(supervisor, "is_prepared", lambda *_: False)
    monkeypatch.setattr(supervisor, "prepare_in_child", lambda *_, **__: run.data_file.write_text(json.dumps(data)))
    monkeypatch.setattr(supervisor, "complete_plan", lambda _: None)
    said = io.StringIO()
    assert supervisor.prepared(run, Recipe(), Console(said), Signals()) is None
    assert said.getvalue().splitlines() == [
        "train: warning: a.jsonl: odd",
        "train: dropped: 2 (empty)",
        "train: changed: 1 (truncated to seq_len)",
        "train: 4 of 9 records have the text of an earlier one",
        "eval held: warning: 1 of 4 records are in the training data, too; its loss will look better than it is",
    ]


@pytest.mark.slow
def test_an_end_that_cannot_be_written_is_one_line_and_the_exit_code_stays(run, capsys):
    run.ledger_file.unlink()
    run.ledger_file.mkdir()
    keep_back(run.reserve)
    conclude(run, 1, Ending(status="failed", failure_class="node", step=3))
    assert capsys.readouterr().err == (
        f"warning: {run.path}: ledger.jsonl, state.json, verdict could not be written (Is a directory)\n"
    )
    assert not run.reserve.exists()


def to_be_continued(**more) -> Ending:
    ending = {"status": "failed", "failure_class": "communication", "step": 9, "message": "m", "verdict": "requeue"}
    return Ending(**{**ending, "again": True, "pause_s": 600.0, **more})


def test_the_next_start_is_made_at_once_after_progress(run):
    with hold_lease(run) as lease:
        ending = supervisor.paused(run, 1, to_be_continued(pause_s=0.0), lease, Signals(), deadline=None)
    assert ending.again
    assert read_verdict(run) is None


@pytest.mark.parametrize("why", ["SIGTERM", "time limit", "touch"])
def test_a_stop_in_the_pause_ends_it_and_leaves_the_next_start_to_whoever_asked(run, why):
    signals, deadline = Signals(), None
    if why == "SIGTERM":
        signals.stop = why
    elif why == "touch":
        (run.control / "stop-request").touch()
    else:
        deadline = time.monotonic() - 1
    with hold_lease(run) as lease:
        ending = supervisor.paused(run, 1, to_be_continued(), lease, signals, deadline=deadline)
    assert (ending.again, ending.status, ending.exit_code, ending.worker_exit_code) == (False, "preempted", 75, 75)
    assert "before attempt 2, which was to begin after: m" in ending.message
    assert (read_state(run).status, read_verdict(run), stop_requested(run)) == ("preempted", "requeue", False)


def test_a_cancel_in_the_pause_is_for_good(run):
    request_stop(run, "cancelled by ann")
    with hold_lease(run) as lease:
        ending = supervisor.paused(run, 1, to_be_continued(), lease, Signals(), deadline=None)
    assert (ending.again, ending.status, read_verdict(run)) == (False, "cancelled", "stop")


def test_l11_whoever_lost_the_run_in_the_pause_starts_nothing_and_writes_nothing(run):
    with hold_lease(run) as lease:
        start_attempt(run, target="local", job_id=None, nodes=["elsewhere"], reason="run")
        ending = supervisor.paused(run, 1, to_be_continued(pause_s=0.0), lease, Signals(), deadline=None)
    assert not ending.again
    assert "has been taken over meanwhile" in ending.message
    assert (read_verdict(run), read_state(run).attempt) == (None, 2)
