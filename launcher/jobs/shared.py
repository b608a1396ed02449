"""Whether the nodes of a job see one run directory: node 0 leaves a token in it, the others must find it there."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from launcher.run.directory import RunDirectory
from launcher.run.files import write_atomic

WAIT_S = 10.0  # a network file system may show a new file late


def leave_token(run: RunDirectory) -> str:
    """A word that only who reads this very directory can know."""
    token = uuid.uuid4().hex
    write_atomic(_file(run), token)
    return token


def problem(run: RunDirectory, token: str, *, wait_s: float = WAIT_S) -> str:
    """Why this node cannot take part; empty when it sees node 0's token."""
    deadline = time.monotonic() + wait_s
    while not ((file := _file(run)).exists() and file.read_text() == token):
        if time.monotonic() >= deadline:
            return (
                f"{run.path}: {socket.gethostname()} and node 0 do not see the same directory. "
                "Put run.dir on a file system that all nodes share."
            )
        time.sleep(0.1)
    return ""


def _file(run: RunDirectory) -> Path:
    return run.control / "shared-token"
