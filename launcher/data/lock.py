"""One builder a store: a file lock that dies with its process, and a record of who holds it and how far they are."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PAUSE_S = 0.1


@contextmanager
def build_lock(path: Path, *, waiting: Callable[[str], None]) -> Iterator[Callable[[int, int], None]]:
    """Hold the lock at `path`; yields a heartbeat (done, total) that those who wait can read.

    Args:
        waiting: called with a line about the holder, each time it has moved on, while somebody else holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        told = ""
        while not _try(handle):
            if (now := _holder(path)) != told:
                waiting(now)
                told = now
            time.sleep(_PAUSE_S)
        beat = _heartbeat(handle)
        beat(0, 0)
        yield beat
    finally:
        os.close(handle)  # releases the lock, as the end of the process does


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _heartbeat(handle: int) -> Callable[[int, int], None]:
    owner = {"host": socket.gethostname(), "pid": os.getpid()}

    def beat(done: int, total: int) -> None:
        record = json.dumps({**owner, "done": done, "total": total}).ljust(200).encode()
        os.pwrite(handle, record, 0)

    return beat


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes() or b"{}")
    except ValueError:  # read while it was being written
        owner = {}
    if "pid" not in owner:
        return "waiting for another process to prepare the data"
    progress = f", {owner['done']} of {owner['total']} shards" if owner["total"] else ""
    return f"waiting for process {owner['pid']} on {owner['host']} to prepare the data{progress}"
