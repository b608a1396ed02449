"""Ties this process to the one that started it: when that one dies, however it dies, Linux ends this one.

`python -m launcher.jobs.tether PARENT COMMAND ...` becomes a command so tied, which gets SIGTERM and can end its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "LAUNCHER_PARENT_PID"  # of the process that must outlive this one
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal at the parent's death, and take it now if that came before the question.

    The setting does not pass to children: each one asks for itself. prctl(2), PR_SET_PDEATHSIG.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execvp(sys.argv[2], sys.argv[2:])
