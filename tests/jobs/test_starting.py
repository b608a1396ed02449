"""A process that neither works nor waits for a disk is found and named; one that works, ends or has begun is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.jobs.starting import Starting, Still, _told
from tests.jobs.make import until


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(("stopped", "how"), [(True, "is stopped"), (False, "stands still")])
def test_a_process_that_does_nothing_is_named_with_its_state(sleeper, stopped, how):
    if stopped:
        os.kill(sleeper.pid, signal.SIGSTOP)
    still, known = Still(still_s=0.2), {sleeper.pid: "the server"}
    assert still.found(known) is None
    found = until("the finding", lambda: still.found(known))
    assert found.startswith(f"the server (pid {sleeper.pid}) {how}: it has done nothing for 0 s")


def test_a_process_that_works_or_has_ended_is_not_found(sleeper):
    code = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as busy:
        still, known = Still(still_s=0.0), {busy.pid: "busy", sleeper.pid: "gone"}
        assert still.found(known) is None
        sleeper.kill()
        sleeper.wait()
        for _ in range(3):
            before = _told(busy.pid)
            until("some work", lambda before=before: _told(busy.pid)[1] > before[1])
            assert still.found(known) is None
        busy.kill()


def test_a_process_that_was_not_looked_at_meanwhile_begins_anew(sleeper):
    still, known = Still(still_s=0.0), {sleeper.pid: "the server"}
    assert still.found(known) is None
    assert still.found({}) is None
    assert still.found(known) is None
    assert still.found(known) is not None


def test_once_every_rank_has_its_log_nothing_is_watched(sleeper, tmp_path: Path):
    starting = Starting(lambda: {sleeper.pid: "a rank"}, tmp_path, ranks=1)
    (tmp_path / "agent-0.log").touch()
    (tmp_path / "0.log").touch()
    starting._still = Still(still_s=0.0)
    assert starting.stuck() is None
    assert starting._over
