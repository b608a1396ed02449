"""The tool of the other tests here: faults strike where they should only, and processes obey while they run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.faults.shim import Shim

_OBEDIENT = """
import os, sys, time
def outcome(call):
    try:
        return call() or 0
    except OSError as error:
        return -error.errno
for line in sys.stdin:
    print(outcome(lambda: eval(line)), flush=True)
"""


class Process:
    """A Python that evaluates what it is given, a line each, and answers with the number or minus errno."""

    def __init__(self, shim: Shim, **environment: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _OBEDIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **shim.environment(), **environment},
        )  # fmt: skip
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._in, self._out = self._popen.stdin, self._popen.stdout

    def send(self, expression: str) -> None:
        self._in.write(expression + "\n")
        self._in.flush()

    def answer(self) -> str:
        return self._out.readline().strip()

    def does(self, expression: str) -> str:
        self.send(expression)
        return self.answer()

    def end(self) -> int:
        self._in.close()
        return self._popen.wait(timeout=60)


def test_calls_are_counted_and_fail_by_path_rank_and_number(shim, tmp_path):
    rank, other = Process(shim, RANK="1"), Process(shim, RANK="0")
    mine = tmp_path / "mine"
    write = f"open({str(mine)!r}, 'ab', buffering=0).write(b'1234')"
    assert rank.does(write) == "4"
    rule = shim.rule("write", path="/mine", rank=1, nth=2, times=2, error="ENOSPC")
    full = str(-errno.ENOSPC)
    assert [rank.does(write) for _ in range(4)] == ["4", full, full, "4"]
    assert [other.does(write) for _ in range(4)] == ["4"] * 4
    assert (rule.calls, rule.hits) == (4, 2)
    rule.remove()
    assert mine.stat().st_size == 4 * 7
    for op, call in (
        ("read", f"len(open({str(mine)!r}, 'rb', buffering=0).read(3))"),
        ("open", f"open({str(mine)!r}).close()"),
        ("create", f"open({str(mine)!r}, 'a').close()"),
        ("fsync", f"os.fsync(os.open({str(mine)!r}, 0))"),
        ("stat", f"os.stat({str(mine)!r}).st_nlink - 1"),
        ("rename", f"os.replace({str(mine)!r}, {str(mine) + '2'!r})"),
        ("link", f"os.link({str(mine)!r}, {str(mine) + '3'!r})"),
        ("mkdir", f"os.mkdir({str(mine) + 's'!r})"),
        ("list", f"len(os.listdir({str(mine) + 's'!r}))"),
        ("rmdir", f"os.rmdir({str(mine) + 's'!r})"),
        ("truncate", f"os.truncate({str(mine) + '2'!r}, 5)"),
        ("unlink", f"os.unlink({str(mine) + '2'!r})"),
    ):
        if op == "link":
            assert rank.does(f"os.replace({str(mine) + '2'!r}, {str(mine)!r})") == "0"
        shim.rule(op, path="/mine", error="ESTALE")
        assert rank.does(call) == str(-errno.ESTALE), op
        assert int(rank.does(call)) >= 0, op
        if op == "link":
            assert rank.does(f"os.replace({str(mine)!r}, {str(mine) + '2'!r})") == "0"
    assert rank.end() == other.end() == 0


def test_a_call_is_cut_held_up_and_never_returned_from(shim, tmp_path):
    process, file, gate = Process(shim), tmp_path / "file", tmp_path / "gate"
    write = f"open({str(file)!r}, 'ab', buffering=0).write(b'123456')"
    shim.rule("write", path="/file", cut=True)
    assert process.does(write) == "3"
    rule = shim.rule("write", path="/file", stall_s=600, release=gate)
    process.send(write)
    while not rule.hits:
        os.sched_yield()
    assert file.stat().st_size == 3
    gate.touch()
    assert process.answer() == "6"
    shim.rule("fsync", path="/file", kill=True)
    process.send(f"os.fsync(os.open({str(file)!r}, 0))")
    assert process.answer() == ""
    assert process._popen.wait(timeout=60) == -signal.SIGKILL


def test_every_change_is_written_down_in_order(shim, tmp_path):
    process, folder = Process(shim, RANK="3"), tmp_path / "folder"
    folder.mkdir()
    with shim.recorded(folder) as calls:
        process.does(f"open({str(folder / 'a')!r}, 'xb', buffering=0).write(b'first')")
        process.does(f"open({str(folder / 'a')!r}, 'ab', buffering=0).write(b'second')")
        process.does(f"os.pwrite(os.open({str(folder / 'a')!r}, os.O_RDWR), b'X', 2)")
        process.does(f"os.fsync(os.open({str(folder)!r}, 0))")
        process.does(f"os.replace({str(folder / 'a')!r}, {str(folder / 'b')!r})")
        process.does(f"open({str(tmp_path / 'elsewhere')!r}, 'w').close()")
    assert process.end() == 0
    expected = [
        ("open", "a", 0, b""), ("write", "a", 0, b"first"), ("open", "a", 0, b""), ("write", "a", 5, b"second"),
        ("write", "a", 2, b"X"), ("fsync", "folder", 0, b""), ("rename", "a", 0, b""),
    ]  # fmt: skip
    assert [(call.op, Path(call.path).name, call.offset, call.data) for call in calls] == expected
    assert {call.rank for call in calls} == {3}
    assert calls[-1].path2 == str(folder / "b")
    assert calls[1].inode == calls[3].inode == (folder / "b").stat().st_ino
    assert calls[5].inode == folder.stat().st_ino


def test_the_wall_clock_jumps_and_the_monotonic_one_does_not(shim):
    process = Process(shim)
    begun = float(process.does("time.time()"))
    monotonic = float(process.does("time.monotonic()"))
    shim.set_clock(3600)
    assert 3600 <= float(process.does("time.time()")) - begun < 3700
    shim.set_clock(-3600)
    assert -3600 <= float(process.does("time.time()")) - begun < -3500
    assert 0 < float(process.does("time.monotonic()")) - monotonic < 100
    assert process.end() == 0


def test_free_space_is_what_a_test_says(shim, tmp_path):
    process = Process(shim)
    free = f"os.statvfs({str(tmp_path)!r}).f_bavail * os.statvfs({str(tmp_path)!r}).f_frsize"
    shim.set_free_bytes(tmp_path, 1 << 20)
    assert process.does(free) == str(1 << 20)
    shim.set_free_bytes(tmp_path, None)
    assert process.does(free) != str(1 << 20)
    assert process.end() == 0


def touch(rank: int, world_size: int, folder: Path) -> str:
    """What became of a file of this rank."""
    try:
        (folder / f"file-{rank}").write_text("x")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "written"


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_of_the_fork_server_obey(shimmed, tmp_path):
    shimmed.rule("write", path="file-", rank=1, error="EIO")
    assert ranks.run_ranks(touch, 2, tmp_path) == ["written", "EIO"]
