"""Who owns a run right now: one launcher at a time over all hosts that share it; a dead owner is taken over.

First proof is a lock that the kernel drops with its process. Not every shared file system carries locks to other
hosts, so the owner also keeps a record whose counter moves; a stranger from another host waits and watches it. No
clocks are compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic

HEARTBEAT_S = 2.0
WATCH_S = 20.0  # a record of another host whose counter stands still for so long has no living owner


class LeaseHeld(UserError):
    """Another launcher works on this run."""


class Lease:
    """What the owner holds."""

    def __init__(self, run: RunDirectory, handle: int) -> None:
        self._file = run.control / "lease"
        self._handle = handle
        self._stop = threading.Event()
        self._record: dict[str, Any] = {**_myself(), "counter": 0, "since": time.time()}
        self._write()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the run back."""
        self._stop.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)
        os.close(self._handle)

    def _write(self) -> None:
        write_atomic(self._file, json.dumps(self._record, indent=2) + "\n")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self._record["counter"] += 1
            try:
                self._write()
            except OSError:
                continue  # a full disk must not end the run; the lock still stands


@contextmanager
def hold_lease(run: RunDirectory, *, watch_s: float = WATCH_S) -> Iterator[Lease]:
    """Own the run until the end of the block.

    Args:
        watch_s: how long the record of an owner on another host is watched before it counts as dead.
    Raises:
        LeaseHeld: a living launcher owns it.
    """
    run.control.mkdir(parents=True, exist_ok=True)
    handle = os.open(run.control / "lease.lock", os.O_RDWR | os.O_CREAT, 0o644)  # close-on-exec by default
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _held(run, read_owner(run)) from None
        owner = read_owner(run)
        if owner is not None and _lives(run, owner, watch_s):
            raise _held(run, owner)
        lease = Lease(run, handle)
    except BaseException:
        os.close(handle)
        raise
    try:
        yield lease
    finally:
        lease.release()


def read_owner(run: RunDirectory) -> dict[str, Any] | None:
    """The record of the owner, dead or alive; None when the last one gave the run back."""
    try:
        return read_json(run.control / "lease")
    except ValueError:
        return None


def is_owned(run: RunDirectory) -> bool:
    """A launcher works on the run now, as far as this host can tell at once."""
    try:
        handle = os.open(run.control / "lease.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    owner = read_owner(run)
    return owner is not None and _same_host(owner) and _process_lives(owner)


def _lives(run: RunDirectory, owner: dict[str, Any], watch_s: float) -> bool:
    if _same_host(owner):
        return _process_lives(owner)
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(min(0.2, watch_s))
        now = read_owner(run)
        if now is None:
            return False
        if (now["host"], now["pid"], now["counter"]) != (owner["host"], owner["pid"], owner["counter"]):
            return True
    return False


def _held(run: RunDirectory, owner: dict[str, Any] | None) -> LeaseHeld:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    pid = owner["pid"] if owner else "PID"
    return LeaseHeld(
        f"{run.path}: {who} works on this run. Follow it with `launcher status {run.path}`, stop it with Ctrl-C or "
        f"`kill {pid}` there, or start another run with run.name=..."
    )


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "pid_start": _start_of(pid)}


def _same_host(owner: dict[str, Any]) -> bool:
    return (owner["host"], owner["boot"]) == (socket.gethostname(), _boot_id())


def _process_lives(owner: dict[str, Any]) -> bool:
    start = _start_of(owner["pid"])
    return start is not None and start == owner["pid_start"]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_of(pid: int) -> str | None:
    """Start of a process in clock ticks since boot (proc(5), stat, field 22); None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]
