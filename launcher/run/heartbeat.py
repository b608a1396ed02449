"""How a rank shows that it gets on: one small mapped file, written without a system call, read by its node's watch.

Counts and a pace lie at fixed places; nothing is waited for on either side. A process that stands still leaves its last
beat there for whoever looks.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "LAUNCHER_HEARTBEAT"  # the folder on this node where the ranks' files lie; without it none is written
PHASES = ("start", "eval", "save", "data", "forward", "step", "report", "end")  # as they follow each other in a step
GROUP = 8  # steps over which a pace is taken
KEPT_GROUPS = 8

_MAGIC = b"beat0001"
_HEAD = struct.Struct("<8sq")  # magic, process id
_BEAT = struct.Struct("<QqQdQ")  # count, step, phase, monotonic seconds, count again: differs while it is written
_PACE = struct.Struct("<dddQ")  # own, wait, wall; number of the group + 1, last
_BEAT_AT, _PACES_AT = 16, 64
_SIZE = _PACES_AT + KEPT_GROUPS * _PACE.size


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank was last.

    count: grows with each beat
    step: optimizer steps finished; phase: what it does since `at`, seconds of this machine's monotonic clock
    """

    count: int
    step: int
    phase: str
    at: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a rank was over `GROUP` steps.

    own_s: seconds for a position in layers that wait for nobody; 0 where none is measured
    wait_s, wall_s: seconds a step that it waited for rows, and in all
    """

    own_s: float
    wait_s: float
    wall_s: float


class Heart:
    """A rank's own end of its file, which is made; one writer."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = file_of(folder, rank)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(handle, _SIZE)
            self._map = mmap.mmap(handle, _SIZE)
        finally:
            os.close(handle)
        self._count = 0
        self.beat(0, 0)
        _HEAD.pack_into(self._map, 0, _MAGIC, os.getpid())  # now it can be read

    def beat(self, phase: int, step: int) -> None:
        """Say what is done from now on: an index of `PHASES`, and the steps finished."""
        self._count = count = self._count + 1
        _BEAT.pack_into(self._map, _BEAT_AT, count, step, phase, time.monotonic(), count)

    def pace(self, group: int, pace: Pace) -> None:
        """Keep the pace of a group of steps; those of the last `KEPT_GROUPS` stay readable."""
        at = _PACES_AT + group % KEPT_GROUPS * _PACE.size
        _PACE.pack_into(self._map, at, 0.0, 0.0, 0.0, 0)
        _PACE.pack_into(self._map, at, pace.own_s, pace.wait_s, pace.wall_s, group + 1)


class Pulse:
    """A rank's file as the watch reads it.

    Raises:
        OSError, ValueError: it is not there, or not complete yet.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank = rank
        with open(file_of(folder, rank), "rb") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ)
        magic, self.pid = _HEAD.unpack_from(self._map, 0)
        if magic != _MAGIC:
            raise ValueError(f"rank {rank}: its heartbeat is not complete yet")

    def beat(self) -> Beat | None:
        """The last beat; None while one is being written."""
        count, step, phase, at, again = _BEAT.unpack_from(self._map, _BEAT_AT)
        return Beat(count, step, PHASES[phase], at) if count == again else None

    def paces(self) -> dict[int, Pace]:
        """The paces that are kept, by group."""
        found = {}
        for slot in range(KEPT_GROUPS):
            *values, number = _PACE.unpack_from(self._map, _PACES_AT + slot * _PACE.size)
            if number:
                found[number - 1] = Pace(*values)
        return found


def file_of(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"{rank}.beat"


def ranks_in(folder: Path) -> list[int]:
    """Ranks that have a file in a folder."""
    return sorted(int(name.removesuffix(".beat")) for name in os.listdir(folder) if name.endswith(".beat"))
