"""`python -m launcher.jobs.prestop RUN [SECONDS]`: what a pod runs before Kubernetes ends its processes.

For pods whose first process is not `launcher worker` and so passes no signal on, as those of a Ray cluster: it asks the
run for a checkpoint and the end, and holds the pod until the attempt has ended. A run that does not train is let be.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.run.control import request_stop
from launcher.run.directory import RunDirectory
from launcher.run.lease import current_owner
from launcher.run.ledger import attempts

_POLL_S = 0.5


def main(run: RunDirectory, seconds: float = 300.0) -> bool:
    """Ask and wait; whether there was an attempt to be asked. seconds: after which it is waited for no more."""
    number = _running(run)
    if number is None:
        return False
    request_stop(run, f"pod {socket.gethostname()} is being ended")
    deadline = time.monotonic() + seconds
    while _running(run) == number and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return True


def _running(run: RunDirectory) -> int | None:
    """The attempt that has not ended, unless its launcher is known to be gone."""
    if not run.exists():
        return None
    last = next(reversed(attempts(run)), None)
    if last is None or last.ended or current_owner(run)[1] is False:
        return None
    return last.number


def read(arguments: Sequence[str]) -> tuple[RunDirectory, float]:
    """Run and seconds of a command line."""
    path, *rest = arguments
    return RunDirectory(Path(path)), float(rest[0]) if rest else 300.0


if __name__ == "__main__":
    main(*read(sys.argv[1:]))
