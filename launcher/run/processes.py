"""Which process a pid means: it counts together with its start, the running kernel and the namespace of pids.

Pids are used again, and containers on one machine have each their own. And which process does not outlive another.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def boot_id() -> str:
    """The running kernel's; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """This process's, `pid:[4026531836]`; empty where it does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> int | None:
    """Start time of a live process, clock ticks since boot; None if there is none, or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    rest = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return None if rest[0] in "ZX" else int(rest[19])  # fields 3 and 22 of proc(5)


def lives(pid: int, start: int | None) -> bool:
    """Whether the process that had this pid and start is there, on this kernel; a zombie is not.

    start: None: it had ended before anybody could see it
    """
    if os.path.exists("/proc/self/stat"):
        return start is not None and start_of(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal at the parent's death, and take it now if that came before the question.

    The setting does not pass to children: each one asks for itself. prctl(2), PR_SET_PDEATHSIG.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
