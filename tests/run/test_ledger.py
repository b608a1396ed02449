"""Attempts are numbered, recorded in two lines, and say which checkpoints count (L11, fencing)."""

from __future__ import annotations

import json
import os
import signal

import pytest

from launcher.run import ledger
from launcher.run.directory import MARKER
from launcher.run.files import append_line, write_atomic
from launcher.run.ledger import (
    StaleAttempt,
    attempts,
    end_attempt,
    fenced,
    latest_attempt,
    ledger_lock,
    valid_checkpoints,
)
from tests.run.make import Script, commit, make_run, start


def names(run):
    return [checkpoint.path.name for checkpoint in valid_checkpoints(run)]


def test_attempts_are_numbered_from_one(tmp_path):
    run = make_run(tmp_path)
    assert latest_attempt(run) == 0
    assert [start(run), start(run), start(run)] == [1, 2, 3]
    assert latest_attempt(run) == 3


def test_lines_of_an_attempt_have_the_documented_fields(tmp_path):
    run = make_run(tmp_path)
    end_attempt(run, start(run), step=5, outcome_class="preemption")
    first, last = (json.loads(line) for line in run.ledger_file.read_text().splitlines())
    assert set(first) == {
        "kind", "attempt", "target", "job_id", "restart", "within", "nodes", "reason", "accepts", "time", "host", "pid",
        "launcher_version",
    }  # fmt: skip
    assert {key: last[key] for key in ("kind", "attempt", "step", "class")} == {
        "kind": "end", "attempt": 1, "step": 5, "class": "preemption",
    }  # fmt: skip
    assert set(last) == {"kind", "attempt", "step", "class", "verdict", "why", "again", "time"}


def test_attempt_without_end_line_was_killed(tmp_path):
    run = make_run(tmp_path)
    start(run, "first")
    end_attempt(run, start(run, "again"), step=7, outcome_class=None)
    first, second = attempts(run)
    assert (first.ended, first.reason, first.end_class) == (False, "first", None)
    assert (second.ended, second.end_step, second.end_class) == (True, 7, "finished")


def test_late_end_of_an_older_attempt_is_about_that_attempt_alone(tmp_path):
    run = make_run(tmp_path)
    first, second = start(run), start(run)
    end_attempt(run, first, step=3, outcome_class="node")
    assert [(a.number, a.ended) for a in attempts(run)] == [(first, True), (second, False)]


def test_torn_start_line_is_no_attempt_and_its_number_is_given_again(tmp_path):
    run = make_run(tmp_path)
    start(run)
    whole = run.ledger_file.read_bytes()
    start(run)
    run.ledger_file.write_bytes(run.ledger_file.read_bytes()[:-9])
    assert latest_attempt(run) == 1
    assert start(run) == 2
    assert run.ledger_file.read_bytes().startswith(whole)
    assert [a.number for a in attempts(run)] == [1, 2]


def test_unknown_fields_and_lines_of_a_later_version_are_passed_over(tmp_path):
    run = make_run(tmp_path)
    start(run)
    append_line(run.ledger_file, {"kind": "pause", "attempt": 9})
    append_line(run.ledger_file, {"kind": "start", "attempt": 2, "accepts": [], "colour": "blue"})
    assert [a.number for a in attempts(run)] == [1, 2]


def test_numbers_do_not_come_back_when_the_ledger_is_lost(tmp_path):
    run = make_run(tmp_path)
    commit(run, step=10, attempt=start(run))
    run.ledger_file.unlink()
    assert names(run) == []
    assert start(run) == 2
    assert names(run) == []


def test_starting_takes_the_former_verdict_away(tmp_path):
    from launcher.run.control import read_verdict, write_verdict

    run = make_run(tmp_path)
    write_verdict(run, "requeue", attempt=start(run))
    assert read_verdict(run) == "requeue"
    start(run)
    assert read_verdict(run) is None


def test_checkpoint_counts_only_with_its_marker(tmp_path):
    run = make_run(tmp_path)
    folder = run.checkpoint(10, start(run))
    folder.mkdir()
    assert names(run) == []
    (folder / MARKER).touch()
    assert names(run) == ["step-00000010-a1"]


def test_checkpoints_ascend_by_step_and_then_attempt(tmp_path):
    run = make_run(tmp_path)
    start(run)
    for step in (100, 20, 100_000_000):
        commit(run, step=step, attempt=1)
    start(run)
    commit(run, step=100, attempt=2)
    assert [(c.step, c.attempt) for c in valid_checkpoints(run)] == [(20, 1), (100, 1), (100, 2), (100_000_000, 1)]


def test_checkpoint_committed_late_by_an_older_attempt_is_void_for_ever_l11(tmp_path):
    """L11: not in the next attempt, nor after yet another, nor when its step is the highest."""
    run = make_run(tmp_path)
    start(run)
    commit(run, step=10, attempt=1)
    start(run)
    commit(run, step=20, attempt=1)
    assert names(run) == ["step-00000010-a1"]
    commit(run, step=15, attempt=2)
    for _ in range(3):
        start(run)
        assert names(run) == ["step-00000010-a1", "step-00000015-a2"]
    assert attempts(run)[-1].accepts == ("step-00000010-a1", "step-00000015-a2")


def test_checkpoint_of_an_attempt_that_has_not_started_does_not_count(tmp_path):
    run = make_run(tmp_path)
    commit(run, step=10, attempt=1)
    assert names(run) == []
    start(run)
    commit(run, step=20, attempt=9)
    assert names(run) == []


def test_writer_stopped_in_mid_commit_and_continued_after_a_newer_start_is_void_l11(tmp_path):
    """L11 with real processes: SIGSTOP before the marker, a newer attempt starts, SIGCONT, marker written."""
    run = make_run(tmp_path)
    attempt = start(run)
    run.checkpoint(10, attempt).mkdir()
    code = "say('ready'); hear(); open(run.checkpoint(10, 1) / 'COMMITTED', 'w').close(); say('written')"
    with Script(run, code) as writer:
        assert writer.heard() == "ready"
        os.kill(writer.pid, signal.SIGSTOP)
        assert start(run) == 2
        os.kill(writer.pid, signal.SIGCONT)
        writer.tell()
        assert writer.heard() == "written"
    assert (run.checkpoint(10, 1) / MARKER).exists()
    assert names(run) == []
    start(run)
    assert names(run) == []


def test_fenced_refuses_the_stale_and_keeps_a_newer_attempt_waiting_l11(tmp_path):
    """L11: what the newest attempt does inside `fenced` happens wholly before a newer one begins."""
    run = make_run(tmp_path)
    first = start(run)
    code = (
        "from launcher.run.ledger import start_attempt\nhear()\nsay('try')\n"
        "say(start_attempt(run, target='t', job_id=None, nodes=1, reason='r'))"
    )
    with Script(run, code) as other:
        with fenced(run, first):
            other.tell()
            assert other.heard() == "try"
            commit(run, step=10, attempt=first)
        assert other.heard() == "2"
    assert names(run) == ["step-00000010-a1"]
    with pytest.raises(StaleAttempt, match="attempt 1 is over, attempt 2 has started"), fenced(run, first):
        pass


def test_process_stopped_while_it_holds_the_lock_holds_up_nobody_for_ever(tmp_path):
    run = make_run(tmp_path)
    code = "from launcher.run.ledger import ledger_lock\nwith ledger_lock(run):\n  say('locked'); hear()\nsay('left')"
    with Script(run, code) as holder:
        assert holder.heard() == "locked"
        os.kill(holder.pid, signal.SIGSTOP)
        with ledger_lock(run, wait_s=0.05):
            os.kill(holder.pid, signal.SIGCONT)
            holder.tell()
            assert holder.heard() == "left"  # its lock was of a file that is no more
            code = "from launcher.run.ledger import _try_lock\nsay(_try_lock(run.control / 'ledger.lock'))"
            with Script(run, code) as third:
                assert third.heard() == "None"
        assert start(run) == 1


def test_four_processes_that_append_at_once_lose_no_line(tmp_path):
    run = make_run(tmp_path)
    code = (
        "from launcher.run.ledger import start_attempt\nhear()\n"
        "for _ in range(5): start_attempt(run, target='t', job_id=None, nodes=1, reason='r')\nsay('done')"
    )
    scripts = [Script(run, code) for _ in range(4)]
    for script in scripts:
        script.tell()
    assert [script.heard() for script in scripts] == ["done"] * 4
    for script in scripts:
        script.__exit__()
    assert [a.number for a in attempts(run)] == list(range(1, 21))


def test_lock_file_replaced_between_opening_and_locking_is_not_the_lock(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    real, path = ledger.fcntl.flock, run.control / "ledger.lock"

    def late(handle, how):
        monkeypatch.setattr(ledger.fcntl, "flock", real)
        write_atomic(path, b"")
        real(handle, how)

    monkeypatch.setattr(ledger.fcntl, "flock", late)
    with ledger_lock(run):
        assert ledger._try_lock(path) is None
