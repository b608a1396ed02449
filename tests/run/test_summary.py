"""The summary of a run: its status word, its failure, what it reads."""

from __future__ import annotations

import json

import pytest

from launcher.run.control import Outcome, request_stop, write_outcome
from launcher.run.lease import hold_lease
from launcher.run.ledger import Failure, end_attempt
from launcher.run.left_out import LeftOut, leave_out
from launcher.run.state import write_state
from launcher.run.summary import list_runs, summarise
from tests.run.make import commit, make_run, start
from tests.run.test_lease import elsewhere


def log(run, **values):
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps(values) + "\n")


def test_summary_has_the_documented_keys_from_the_first_moment_on(tmp_path):
    summary = summarise(make_run(tmp_path))
    assert set(summary) == {
        "version", "run", "path", "run_id", "status", "step", "total_steps", "attempt", "attempts", "last_checkpoint",
        "save_every", "rehearsal", "failure", "loss", "loss_step", "evaluation", "guards", "slow", "updated", "owner",
        "stop_requested", "verdict",
    }  # fmt: skip
    assert (summary["run"], summary["status"], summary["attempt"], summary["attempts"]) == ("demo", "queued", 0, [])
    json.dumps(summary, allow_nan=False)


def test_status_follows_a_run_from_queued_to_finished(tmp_path):
    run = make_run(tmp_path)
    seen = [summarise(run)["status"]]
    with hold_lease(run):
        seen.append(summarise(run)["status"])
        attempt = start(run)
        seen.append(summarise(run)["status"])
        write_state(run, "running", attempt=attempt, step=1)
        seen.append(summarise(run)["status"])
        write_state(run, "finished", attempt=attempt, step=9)
        end_attempt(run, attempt, step=9, outcome_class=None)
    seen.append(summarise(run)["status"])
    assert seen == ["queued", "starting", "starting", "running", "finished"]


@pytest.mark.parametrize("word", [True, False])
def test_run_without_live_owner_and_end_line_is_interrupted(tmp_path, word):
    run = make_run(tmp_path)
    attempt = start(run)
    if word:
        write_state(run, "running", attempt=attempt, step=1)
    assert summarise(run)["status"] == "interrupted"


def test_run_whose_owner_cannot_be_seen_from_here_is_unknown(tmp_path):
    run = make_run(tmp_path)
    elsewhere(run)
    start(run)
    summary = summarise(run)
    assert summary["status"] == "unknown"
    assert summary["owner"] == {"host": "faraway", "pid": 1, "alive": None}


def test_loss_and_step_come_from_the_end_of_a_long_file_of_metrics(tmp_path):
    run = make_run(tmp_path)
    with hold_lease(run):
        write_state(run, "running", attempt=start(run), step=3, total_steps=9000)
        for step in range(1, 3001):
            log(run, step=step, loss=3000.0 - step, lr=0.1, attempt=1, filler="x" * 40)
        log(run, step=3000, eval_loss=1.0)
        with open(run.metrics_file, "a") as file:
            file.write('{"step": 3001, "lo')
        summary = summarise(run)
    assert (summary["loss"], summary["step"], summary["total_steps"]) == (0.0, 3000, 9000)


def test_the_last_evaluation_tells_the_loss_of_each_set(tmp_path):
    run = make_run(tmp_path)
    assert summarise(run)["evaluation"] is None
    for step in (0, 10):
        log(run, step=step, eval_loss=3.0 - step / 10, **{"eval_loss/web": 2.5, "eval_loss/chat": None}, attempt=1)
        log(run, step=step + 1, loss=1.0, attempt=1)
    found = summarise(run)["evaluation"]
    assert found == {"step": 10, "loss": 2.0, "sets": {"web": 2.5, "chat": None}}


def test_what_the_guards_counted_is_told_with_the_last_logged_step(tmp_path):
    run = make_run(tmp_path)
    assert summarise(run)["guards"] == {"skipped": 0, "spikes": 0, "left_out": 0}
    log(run, step=7, loss=1.0, attempt=1, steps_skipped=2, loss_spikes=3)
    leave_out(run, LeftOut(step=5, attempt=1, reason="spike", loss=9.0, limit=2.0, records={"a.jsonl": [1]}))
    assert summarise(run)["guards"] == {"skipped": 2, "spikes": 3, "left_out": 1}


def test_line_that_a_stale_attempt_adds_late_is_not_the_loss(tmp_path):
    run = make_run(tmp_path)
    start(run)
    start(run)
    log(run, step=5, loss=2.0, attempt=2)
    log(run, step=99, loss=7.0, attempt=1)
    assert summarise(run)["loss"] == 2.0


@pytest.mark.parametrize("ended", [True, False])
def test_step_and_loss_of_a_killed_attempt_are_those_that_it_logged_last(tmp_path, ended):
    run = make_run(tmp_path)
    attempt = start(run)
    write_state(run, "running", attempt=attempt, step=84, total_steps=300)
    for step in range(1, 92):
        log(run, step=step, loss=100.0 - step, attempt=attempt)
    if ended:
        end_attempt(run, attempt, step=None, outcome_class="unknown")
    summary = summarise(run)
    assert (summary["step"], summary["loss"], summary["loss_step"]) == (91, 9.0, 91)
    assert summary["attempts"][0]["last_step"] == 91


def test_loss_says_its_own_step_when_the_run_goes_on_from_an_older_checkpoint(tmp_path):
    run = make_run(tmp_path)
    commit(run, step=80, attempt=start(run))
    log(run, step=91, loss=9.0, attempt=1)
    start(run)
    summary = summarise(run)
    assert (summary["step"], summary["loss"], summary["loss_step"]) == (80, 9.0, 91)
    assert [attempt["last_step"] for attempt in summary["attempts"]] == [91, None]


def test_a_killed_attempts_last_step_is_found_behind_a_long_later_one(tmp_path):
    run = make_run(tmp_path)
    log(run, step=7, loss=9.0, attempt=start(run))
    attempt = start(run)
    for step in range(1, 1001):
        log(run, step=step, loss=1.0, attempt=attempt, filler="x" * 100)
    assert [attempt["last_step"] for attempt in summarise(run)["attempts"]] == [7, 1000]


def test_loss_that_is_no_number_is_null(tmp_path):
    run = make_run(tmp_path)
    start(run)
    log(run, step=5, loss=float("nan"), attempt=1)
    assert summarise(run)["loss"] is None


def test_step_of_an_attempt_that_has_not_spoken_is_that_of_its_checkpoint(tmp_path):
    run = make_run(tmp_path)
    commit(run, step=40, attempt=start(run))
    start(run)
    summary = summarise(run)
    assert summary["step"] == 40
    assert summary["last_checkpoint"] == {"step": 40, "attempt": 1, "path": str(run.checkpoint(40, 1))}
    assert summary["attempts"][1]["accepts"] == ["step-00000040-a1"]


def test_first_failing_rank_is_shown_with_its_traceback(tmp_path):
    run = make_run(tmp_path)
    attempt = start(run)
    write_outcome(run, attempt, 0, Outcome("failed", "communication", 4, "lost a peer", "T0", "n0"))
    write_outcome(run, attempt, 1, Outcome("failed", "out_of_memory", 4, "no memory", "T1", "n1"))
    end_attempt(run, attempt, step=4, outcome_class="out_of_memory")
    failure = summarise(run)["failure"]
    assert isinstance(failure.pop("time"), float)
    assert failure == {
        "rank": 1, "node": "n1", "step": 4, "class": "out_of_memory", "message": "no memory", "traceback": "T1",
    }  # fmt: skip


def test_the_failure_that_the_launcher_judged_is_in_the_summary_of_its_attempt_and_of_the_run_while_it_pauses(tmp_path):
    run = make_run(tmp_path)
    first = Failure(rank=1, node="n1", step=4, failure_class="hang", message="stood still", traceback="T", time=2.5)
    end_attempt(run, start(run), step=5, outcome_class="hang", verdict="requeue", again=True, first=first)
    summary = summarise(run)
    assert summary["failure"] == {
        "rank": 1, "node": "n1", "step": 4, "class": "hang", "message": "stood still", "traceback": "T", "time": 2.5,
    }  # fmt: skip
    assert summary["attempts"][0]["end"]["first"] == summary["failure"]
    assert (summary["attempts"][0]["end"]["again"], summary["status"]) == (
        True,
        "interrupted",
    )  # nobody holds the lease


def test_failure_of_an_earlier_attempt_is_not_that_of_the_run(tmp_path):
    run = make_run(tmp_path)
    write_outcome(run, start(run), 0, Outcome("failed", "data", 4, "bad", "T", "n"))
    end_attempt(run, 1, step=4, outcome_class="data")
    write_state(run, "finished", attempt=start(run), step=9)
    assert summarise(run)["failure"] is None


def test_failure_before_any_rank_could_speak_is_what_the_launcher_said(tmp_path):
    run = make_run(tmp_path)
    write_state(run, "failed", attempt=start(run), step=None, message="data/x.jsonl: missing")
    end_attempt(run, 1, step=None, outcome_class="user")
    failure = summarise(run)["failure"]
    assert isinstance(failure.pop("time"), float)
    assert failure == {
        "rank": None, "node": None, "step": None, "class": "user", "message": "data/x.jsonl: missing",
        "traceback": None,
    }  # fmt: skip


def test_stop_request_is_shown_with_its_reason(tmp_path):
    run = make_run(tmp_path)
    request_stop(run, "time limit")
    assert summarise(run)["stop_requested"] == "time limit"


def test_runs_are_listed_last_changed_first_even_when_one_is_damaged(tmp_path):
    bad, first, _ = (make_run(tmp_path, name) for name in ("bad", "first", "second"))
    bad.run_file.write_text("{")
    (tmp_path / "no-run").mkdir()
    write_state(first, "finished", attempt=start(first), step=1)
    assert [summary["run"] for summary in list_runs(tmp_path)] == ["first", "second", "bad"]
    assert list_runs(tmp_path / "missing") == []
