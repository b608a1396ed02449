"""Why a process was killed that said nothing: what the kernel tells of memory that ran out, where that may be read."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

OUT_OF_MEMORY = "memory ran out"  # in what is said of a process that the kernel chose
_LOG_BYTES = 1 << 20
_KILL = "killed by SIGKILL"


class MemoryKills:
    """What the kernel has told since this was made of processes that it ended for want of memory.

    Its counter is that of this process's control group, in which the ranks are, too; of other groups nothing is known.
    """

    def __init__(self, files: Sequence[Path] | None = None) -> None:
        self._files = _counters() if files is None else files
        self._before = self._count()
        self._since = time.monotonic()

    def explained(self, how: str, pid: int | None) -> str:
        """How a process ended, with the likely reason where a signal does not say it."""
        if how != _KILL:
            return how
        if pid is not None and (line := _logged(pid, since=self._since)):
            return f"{how} ({OUT_OF_MEMORY}, says the kernel: {line})"
        now = self._count()
        if now is None or self._before is None:
            return f"{how} (the kernel does that when memory runs out: see dmesg; else a person or a scheduler did it)"
        if (kills := now - self._before) > 0:
            return f"{how} ({OUT_OF_MEMORY}: the kernel ended {kills} process{'es' * (kills > 1)} here meanwhile)"
        return f"{how} (by a person or a scheduler: the kernel counts none that it ended for want of memory)"

    def _count(self) -> int | None:
        counts = [count for file in self._files if (count := _kills(file)) is not None]
        return max(counts, default=None)


def _counters() -> list[Path]:
    """Files in which the kernel counts, of control groups version 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup", controllers) if controllers else Path("/sys/fs/cgroup")
        if controllers in ("", "memory"):
            name = "memory.oom_control" if controllers else "memory.events"
            files += [folder / name for folder in (root / path.lstrip("/"), root)]  # a container sees its own as root
    return [file for file in files if _kills(file) is not None]


def _kills(file: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _logged(pid: int, *, since: float) -> str:
    """The line of the kernel's log that tells of this process's end, if it is there and may be read.

    since: monotonic seconds, which the log counts, too: process ids come back
    """
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    found, read = "", 0
    try:
        while read < _LOG_BYTES:
            record = os.read(handle, 8192).decode(errors="replace")
            read += len(record)
            head, _, text = record.partition(";")
            if int(head.split(",")[2]) / 1e6 >= since and re.search(rf"Killed process {pid}\b", text):
                found = text.splitlines()[0]
    except OSError:  # its end
        pass
    finally:
        os.close(handle)
    return found
