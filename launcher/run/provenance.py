"""Where a run comes from: its id, the versions of launcher and Python, the commit of the user's own repository."""

from __future__ import annotations

import platform
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from launcher import __version__

_GIT_TIMEOUT_S = 5


def provenance(folder: Path | None = None) -> dict[str, Any]:
    """What run.json says of a new run's origin.

    Args:
        folder: whose git repository is recorded; None: the current directory
    """
    return {
        "run_id": uuid.uuid4().hex,
        "created": time.time(),
        "host": socket.gethostname(),
        "launcher_version": __version__,
        "python_version": platform.python_version(),
        "git": git_state(folder or Path.cwd()),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """{commit, dirty} of the repository that holds `folder`; None without git, repository or commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "dirty": None if changed is None else bool(changed.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):  # absent, not a repository, or on a disk too slow to wait for
        return None
    return done.stdout
