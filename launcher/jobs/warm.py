"""The fork server: a process that has imported torch and the model library once; ranks start from it at once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from multiprocessing import forkserver
from typing import Any

from launcher.jobs.tether import PARENT
from launcher.trainer.preload import MODULES


def start() -> None:
    """Start the fork server, or keep the one that runs. Returns at once; it imports while the caller goes on.

    Its environment is that of this moment. Call it from the main thread: the kernel counts the death of the thread that
    started a process as the death of the parent.
    """
    assert threading.current_thread() is threading.main_thread()
    context().set_forkserver_preload(["launcher.jobs.server", "launcher.jobs.rank", "launcher.jobs.agent", *MODULES])
    os.environ[PARENT] = str(os.getpid())
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited: a Ctrl-C during the imports does not end the server
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def stop() -> None:
    """Kill the fork server and with it every process it started; the next `start` makes a new one."""
    if (pid := server_pid()) is not None:
        os.kill(pid, signal.SIGKILL)


def server_pid() -> int | None:
    """The fork server of this process, whose children the ranks are; None before `start`."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def context() -> Any:
    """The multiprocessing context whose processes start warm."""
    return multiprocessing.get_context("forkserver")
