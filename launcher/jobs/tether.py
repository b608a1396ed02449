"""Ties a command to the launcher that starts it: when that one dies, however it dies, Linux asks the command to end.

`python -m launcher.jobs.tether PARENT COMMAND ...` becomes a command so tied, which gets SIGTERM and can end its own.
torchrun and accelerate, which would wait 30 s for ranks that do not heed it, get SIGKILL: their ranks are tied to them.
"""

from __future__ import annotations

import os
import signal
import sys

from launcher.run.processes import die_with_parent

__all__ = ["PARENT", "die_with_parent"]

PARENT = "LAUNCHER_PARENT_PID"  # of the process that must outlive this one
_RANKS_ARE_TIED = ("torchrun", "accelerate")


if __name__ == "__main__":
    ends_its_own = os.path.basename(sys.argv[2]) not in _RANKS_ARE_TIED
    die_with_parent(int(sys.argv[1]), signal.SIGTERM if ends_its_own else signal.SIGKILL)
    os.execvp(sys.argv[2], sys.argv[2:])
