"""Ties this process to the one that started it: when that one dies, however it dies, Linux kills this one."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT = "LAUNCHER_PARENT_PID"  # of the process that must outlive this one
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL at the parent's death, and die now if it came before the question.

    The setting does not pass to children: each one asks for itself. prctl(2), PR_SET_PDEATHSIG.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
