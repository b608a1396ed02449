"""The fork server: a process that has imported torch and the model library once; ranks start from it at once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from typing import Any

from launcher.jobs import scratch
from launcher.jobs.signals import STOPPING
from launcher.jobs.starting import Still
from launcher.jobs.tether import PARENT
from launcher.trainer.preload import modules

NAME = "the process that starts the ranks"
_POLL_S = 0.02


def start(kind: str = "ddp", device: str = "cpu") -> None:
    """Start the fork server, or keep the one that runs. Returns at once; it imports while the caller goes on.

    `strategy.kind` and the device say what it imports.

    Its environment is that of this moment. Call it from the main thread: the kernel counts the death of the thread that
    started a process as the death of the parent.
    """
    assert threading.current_thread() is threading.main_thread()
    own = ["launcher.jobs.server", "launcher.jobs.rank", "launcher.jobs.agent"]
    context().set_forkserver_preload([*own, *modules(kind, device)])
    if kind.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = device  # else DeepSpeed asks each kind of device in turn
    os.environ[PARENT] = str(os.getpid())
    scratch.adopt_multiprocessing()
    with _held_back(STOPPING):
        resource_tracker.ensure_running()  # unblocks two of them once it has started its process (Python 3.11)
    with _held_back(STOPPING):
        forkserver.ensure_running()


@contextmanager
def _held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes started here begin with these signals blocked; this one gets those that come meanwhile afterwards.

    The resource tracker keeps them so, else a hang-up would end it and its next start would complain of what the first
    one knew. The fork server ignores them before it lets them through (`launcher.jobs.server`).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StandsStill(Exception):
    """The fork server does nothing; the text says so."""


def begin(process: Any, *, stop: Callable[[], bool]) -> bool:
    """Start a process of this context, without waiting for a fork server that stands still; whether it was started.

    stop: asked again and again; it is not started when it says so

    Raises:
        StandsStill: the fork server, which is killed then; EOFError, ConnectionError: it has ended.
    """
    failed: list[BaseException] = []

    def start() -> None:
        try:
            process.start()
        except BaseException as error:
            failed.append(error)

    thread, still = threading.Thread(target=start, name="start", daemon=True), Still()
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        server = server_pid()
        why = None if server is None else still.found({server: NAME})
        if why is not None or (thread.is_alive() and stop()):
            _kill_server()  # which ends the wait
            thread.join()
            if why is not None:
                raise StandsStill(why)
            return False
    if failed:
        raise failed[0]
    return True


def stop() -> None:
    """Kill the fork server and with it every process it started; the next `start` makes a new one."""
    _kill_server()


def _kill_server() -> None:
    if (pid := server_pid()) is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def renew(kind: str, device: str) -> None:
    """Replace the fork server by one that imports what `sys.path` leads to now; it must not have started anything."""
    if (pid := server_pid()) is not None:
        stop()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # `start` collects it
    start(kind, device)


def server_pid() -> int | None:
    """The fork server of this process, whose children the ranks are; None before `start`."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def context() -> Any:
    """The multiprocessing context whose processes start warm."""
    return multiprocessing.get_context("forkserver")
