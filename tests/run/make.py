"""Runs, checkpoints and processes for the tests of the run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import start_attempt


def make_run(folder: Path, name: str = "demo") -> RunDirectory:
    """A new run, not started."""
    run = RunDirectory(folder / name)
    run.create({"run": {"name": name}}, {"version": 1, "total_steps": None}, {"train.seed": 1})
    return run


def start(run: RunDirectory, reason: str = "test") -> int:
    """Begin an attempt."""
    return start_attempt(run, target="torchrun", job_id="7", nodes=["here"], reason=reason)


def commit(run: RunDirectory, *, step: int, attempt: int) -> Path:
    """A checkpoint folder with its marker."""
    folder = run.checkpoint(step, attempt)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


class Script:
    """A fresh Python that runs `code`: `run` is in scope, `say(text)` is heard here, `hear()` waits for `tell`."""

    def __init__(self, run: RunDirectory, code: str, **popen: object) -> None:
        head = (
            "import sys, os\nfrom launcher.run.directory import RunDirectory\nrun = RunDirectory(sys.argv[1])\n"
            "def say(text): print(text, flush=True)\ndef hear(): return sys.stdin.readline()\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + code, str(run.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen,  # type: ignore[call-overload]
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self._in.close()
        self._out.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def heard(self) -> str:
        """The next line it says; empty when it has ended."""
        return self._out.readline().rstrip("\n")

    def tell(self, text: str = "") -> None:
        """Let its `hear` return."""
        self._in.write(text + "\n")
        self._in.flush()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
