"""Worker processes answer every task, and their failures reach the caller as what they are."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from launcher.data.workers import WorkerDied, map_unordered
from launcher.errors import UserError


def work(context, task):
    if task == "user":
        raise UserError("f: record 3: wrong")
    if task == "full":
        raise ValueError("in a library") from OSError(errno.ENOSPC, "No space left on device")
    if task == "bug":
        raise KeyError("missing")
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return context + task


def test_every_task_is_answered_by_as_many_workers_as_there_are():
    assert sorted(map_unordered(work, 10, list(range(20)), num_workers=2)) == [(i, 10 + i) for i in range(20)]
    assert list(map_unordered(work, 10, [], num_workers=2)) == []


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("user", UserError, "f: record 3: wrong"),
        ("full", OSError, "No space left on device"),
        ("bug", WorkerDied, "KeyError: 'missing'"),
        ("kill", WorkerDied, "ended with code -9"),
    ],
)
def test_a_failure_reaches_the_caller(task, error, message):
    with pytest.raises(error, match=message):
        list(map_unordered(work, 10, [1, task], num_workers=1))
