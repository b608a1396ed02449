"""Whether processes come into being: one that neither works nor waits for a disk for half a minute never will."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

STILL_S = 30.0  # a machine under load gives every process that wants it some time in less
_LOOK_S = 1.0


class Still:
    """Notices that a process does nothing, by what the kernel counts for it; looked at again and again.

    still_s: for how long it must do nothing
    """

    def __init__(self, still_s: float = STILL_S) -> None:
        self._still_s = still_s
        self._seen: dict[int, tuple[int, float]] = {}  # ticks of the processor that a process has had, and since when

    def found(self, processes: Mapping[int, str]) -> str | None:
        """Which of these stands still, in words; one that was not among them at the last look begins anew.

        processes: process id to what it is
        """
        now = time.monotonic()
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in processes}
        for pid, name in processes.items():
            if (told := _told(pid)) is None:
                continue  # it has ended, which others judge
            state, ticks = told
            before, since = self._seen.get(pid, (-1, now))
            if ticks != before or state == "D":
                self._seen[pid] = (ticks, now)
            elif now - since >= self._still_s:
                how = "is stopped" if state in "Tt" else "stands still"
                return f"{name} (pid {pid}) {how}: it has done nothing for {now - since:.0f} s"
        return None


class Starting:
    """Watches the ranks of this node until each has begun its log.

    Args:
        processes: process id to what it is, of those that are at work on it
        logs: folder of the ranks' logs on this node; ranks: how many there will be
    """

    def __init__(self, processes: Callable[[], Mapping[int, str]], logs: Path, *, ranks: int) -> None:
        self._processes, self._logs, self._ranks, self._still = processes, logs, ranks, Still()
        self._over, self._next = False, 0.0

    def stuck(self) -> str | None:
        """Which process stands still, in words; None while all is well, and once all ranks run."""
        now = time.monotonic()
        if self._over or now < self._next:
            return None
        self._next = now + _LOOK_S
        self._over = sum(file.stem.isdecimal() for file in self._logs.glob("*.log")) >= self._ranks
        return None if self._over else self._still.found(self._processes())


def _told(pid: int) -> tuple[str, int] | None:
    """A process's state and its time on the processor, of proc(5); None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[11]) + int(fields[12])
