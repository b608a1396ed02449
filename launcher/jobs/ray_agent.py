"""What the Ray driver has on each node: starts `launcher worker` there, passes its lines on, and stops it when told.

The driver makes an actor of `RayAgent`; nothing here decides about restarts.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.run.control import GROW, read_verdict, request_stop
from launcher.run.directory import RunDirectory

_POLL_S = 1.0  # an empty answer after that long
_LINES = 1000  # in one answer
_WORKER = (  # in the agent's child: it dies with the agent, and gets the signals that Ray's own processes block
    "import signal, sys; from launcher.jobs.tether import die_with_parent; die_with_parent(int(sys.argv.pop(1))); "
    "signal.pthread_sigmask(signal.SIG_SETMASK, ()); from launcher.cli import entry; entry()"
)


@dataclass(frozen=True, slots=True)
class Meeting:
    """A node as the others reach it: its name, its address, and a port of it that is free now; Ray's id of it."""

    name: str
    address: str
    port: int
    node_id: str


class RayAgent:
    """One node of one attempt; `stop` may be called while `poll` waits."""

    def __init__(self, run: str) -> None:
        self._run = RunDirectory(Path(run))
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._code: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False
        self._lock = threading.Lock()

    def meeting(self) -> Meeting:
        """Where the other nodes reach this one: the address by which the cluster knows it, and a free port."""
        import ray
        from ray.util import get_node_ip_address

        node_id = ray.get_runtime_context().get_node_id()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return Meeting(socket.gethostname(), get_node_ip_address(), int(probe.getsockname()[1]), node_id)

    def verdict(self) -> tuple[str | None, int]:
        """The run's verdict and when it was written (ns), which tells an old one from a new one."""
        try:
            written = (self._run.control / "verdict").stat().st_mtime_ns
        except OSError:
            return None, 0
        return read_verdict(self._run), written

    def start(self, options: Sequence[str], recipe: str, environment: Mapping[str, str], folder: str | None) -> None:
        """Start this node's `launcher worker RUN --recipe ... OPTIONS`.

        recipe: the recipe's text; folder: where it runs, None: where the agent does
        """
        threading.Thread(
            target=self._host, args=(list(options), recipe, dict(environment), folder), name="worker", daemon=True
        ).start()

    def poll(self) -> tuple[list[str], int | None]:
        """Lines that have come, and the worker's exit code once it has ended; waits a second for either."""
        found: list[str] = []
        try:
            line = self._lines.get(timeout=_POLL_S)
            while True:
                found += [] if line is None else [line]
                if len(found) == _LINES:
                    break
                line = self._lines.get_nowait()
        except queue.Empty:
            pass
        code = self._code  # set behind the last line, so looked at before asking whether one is left
        return found, code if self._lines.empty() else None

    def stop(self) -> None:
        """Ask for a checkpoint and the end, as SIGTERM does."""
        with self._lock:
            self._stopping = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def grow(self, why: str) -> None:
        """Ask for a checkpoint and another start, with more nodes; one attempt's request, which its end takes back."""
        with contextlib.suppress(OSError):
            request_stop(self._run, f"{GROW}: {why}")

    def kill(self) -> None:
        """End the worker and its ranks at once; they die with it."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _host(self, options: list[str], recipe: str, environment: dict[str, str], folder: str | None) -> None:
        """In a thread of its own, which lives as long as the worker: to Linux, that thread is the worker's parent."""
        code = 1
        try:
            with tempfile.TemporaryDirectory(prefix="launcher-ray-") as scratch:
                file = Path(scratch, "recipe.yaml")
                file.write_text(recipe)
                code = self._work([str(self._run.path), "--recipe", str(file), *options], environment, folder)
        except Exception as error:
            self._lines.put(f"the worker could not be started: {type(error).__name__}: {error}")
        finally:
            self._code = code
            self._lines.put(None)

    def _work(self, arguments: list[str], environment: dict[str, str], folder: str | None) -> int:
        command = [sys.executable, "-u", "-c", _WORKER, str(os.getpid()), "worker", *arguments]
        with self._lock:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            if self._stopping:
                self._process.send_signal(signal.SIGTERM)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        return self._process.wait()
