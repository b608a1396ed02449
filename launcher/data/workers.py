"""Runs picklable tasks in processes that share nothing with the caller: no fork, no import of its main module.

Each worker is a fresh interpreter on one end of a socket; it ends when that closes, so a killed caller leaves none.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from launcher.data.space import full_disk
from launcher.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerDied(RuntimeError):
    """A worker ended without an answer, as when the kernel kills it for memory."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection


def map_unordered(
    function: Callable[[Any, Any], Any], context: Any, tasks: Sequence[Any], *, num_workers: int
) -> Iterator[tuple[Any, Any]]:
    """(task, function(context, task)) as they finish; `function` is importable, `context` is sent once to each worker.

    Raises:
        UserError: as the function raised it.
        OSError: the disk is full.
        WorkerDied: a worker was killed, or raised anything else; holds its traceback.
    """
    waiting = list(reversed(tasks))
    with _started(min(num_workers, len(tasks)), (function, context)) as workers:
        busy: dict[Connection, tuple[_Worker, Any]] = {}
        for worker in workers:
            _give(worker, waiting, busy)
        while busy:
            for pipe in wait(list(busy)):
                worker, task = busy.pop(cast(Connection, pipe))
                result = _answer(worker)
                _give(worker, waiting, busy)
                yield task, result


@contextmanager
def _started(count: int, job: Any) -> Iterator[list[_Worker]]:
    workers = []
    try:
        for _ in range(count):
            workers.append(_start())
        for worker in workers:
            worker.pipe.send(job)
        yield workers
    finally:
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def _start() -> _Worker:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.data.workers", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=False,
    )  # fmt: skip
    theirs.close()
    return _Worker(process, Connection(ours.detach()))


def _give(worker: _Worker, waiting: list[Any], busy: dict[Connection, tuple[_Worker, Any]]) -> None:
    if waiting:
        task = waiting.pop()
        worker.pipe.send(task)
        busy[worker.pipe] = (worker, task)


def _answer(worker: _Worker) -> Any:
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionError):
        code = worker.process.wait()
        raise WorkerDied(
            f"a data worker ended with code {code} (-9: killed, often for memory); try fewer data.num_workers"
        ) from None
    if kind == "user":
        raise UserError(value)
    if kind == "full":
        raise OSError(*value)
    if kind == "error":
        raise WorkerDied(value)
    return value


def _serve(pipe: Connection) -> None:
    try:
        function, context = pipe.recv()
        while True:
            task = pipe.recv()
            pipe.send(_attempt(function, context, task))
    except (EOFError, ConnectionError):  # the caller is done, or dead
        return


def _attempt(function: Callable[[Any, Any], Any], context: Any, task: Any) -> tuple[str, Any]:
    try:
        result = function(context, task)
        pickle.dumps(result)
        return "done", result
    except UserError as error:
        return "user", str(error)
    except Exception as error:
        if full := full_disk(error):
            return "full", full.args
        import traceback

        return "error", traceback.format_exc()


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, also in the middle of a task; elsewhere it ends after it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the caller decides
    _serve(Connection(int(sys.argv[1])))
