"""Where a run and each of its attempts come from: versions, git commit, uncommitted changes; never a secret's value."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.run.files import write_atomic

RECORD, PATCH = "provenance.json", "dirty.patch"
PATCH_BYTES = 1 << 20
UNTRACKED_NAMED = 200
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "safetensors", "numpy", "numba", "triton",
    "liger-kernel", "flash-attn", "ray", "kubernetes", "omegaconf",
)  # fmt: skip
SECRET = (".env*", "*.env", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", ".netrc", "*secret*", "*credential*",
          "*token", "*.token", "token.*", "*password*", ".htpasswd", "kubeconfig*", ".pypirc")  # fmt: skip
_GIT_TIMEOUT_S = 5
_LAST_WORDS_S = 10.0
_recording: list[threading.Thread] = []


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


def record(folder: Path, *, source: Path | None = None) -> None:
    """Write provenance.json into a folder, and dirty.patch where the repository has uncommitted changes.

    Args:
        source: whose git repository is recorded; None: the current directory. Where the code is a copy that
            `cluster.snapshot` made, or `source` is the folder of a submission, what was recorded there is repeated.
    Raises:
        OSError: it cannot be written.
    """
    source = source or Path.cwd()
    values: dict[str, Any] = {
        "time": time.time(),
        "host": socket.gethostname(),
        "folder": str(source),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "launcher_version": __version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }
    if (earlier := _recorded_earlier(source)) is not None:
        said = json.loads((earlier / RECORD).read_text())
        values |= {"recorded_in": str(earlier), "git": said["git"]}
        if (earlier / PATCH).exists():
            shutil.copyfile(earlier / PATCH, folder / PATCH)
    else:
        values["git"], patch = _git_record(source)
        if patch:
            write_atomic(folder / PATCH, patch, durable=False)
    write_atomic(folder / RECORD, json.dumps(values, indent=2) + "\n", durable=False)


def record_beside(folder: Path) -> None:
    """`record` in a thread, so that ranks need not wait for git; `recorded` waits for it. What fails is left undone."""
    source = Path.cwd()

    def write() -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            record(folder, source=source)

    thread = threading.Thread(target=write, name="provenance", daemon=True)
    _recording.append(thread)
    thread.start()


def recorded() -> None:
    """Wait until what `record_beside` began is written, for some seconds at most."""
    while _recording:
        _recording.pop().join(_LAST_WORDS_S)


def git_state(folder: Path) -> dict[str, Any] | None:
    """{commit, dirty} of the repository that holds `folder`; None without git, repository or commit."""
    commit = git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "dirty": None if changed is None else bool(changed.strip())}


def is_secret(path: str) -> bool:
    """Whether a file's name says that what it holds is nobody else's business."""
    return any(fnmatch(path.rpartition("/")[2].lower(), pattern) for pattern in SECRET)


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it is absent or fails, as outside of a repository."""
    done = _run(folder, arguments)
    return None if done is None else done.decode(errors="replace")


def _git_record(folder: Path) -> tuple[dict[str, Any] | None, bytes]:
    """What is said of a repository, and the patch that leads from its commit to what lies there."""
    if (said := git(folder, "rev-parse", "HEAD", "--show-toplevel")) is None:
        return None, b""
    commit, root = said.splitlines()
    top = Path(root)
    changed = _names(git(top, "diff", "--name-only", "-z", "--no-renames", "HEAD"))
    untracked = _names(git(top, "ls-files", "--others", "--exclude-standard", "-z"))
    secret = [name for name in changed if is_secret(name)]
    patch = _patch(top, leave_out=secret) if len(secret) < len(changed) else b""
    values = {
        "root": root,
        "commit": commit,
        "dirty": bool(changed),
        "changed": len(changed),
        "left_out": secret,  # changed files whose names look like a secret's
        "patch": PATCH if patch else None,
        "patch_cut": len(patch) > PATCH_BYTES,
        "untracked": untracked[:UNTRACKED_NAMED],  # names alone
        "untracked_count": len(untracked),
    }
    if len(patch) > PATCH_BYTES:
        patch = patch[:PATCH_BYTES] + f"\n# cut here, after {PATCH_BYTES} bytes\n".encode()
    return values, patch


def _patch(top: Path, *, leave_out: Iterable[str]) -> bytes:
    """The first bytes of the difference, one more than are kept; empty where git is too slow to wait for."""
    excluded = [f":(top,exclude,literal){name}" for name in leave_out]
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "HEAD", "--", ":/", *excluded]
    return (_run(top, ["diff", *options], most=PATCH_BYTES + 1)) or b""


def _run(folder: Path, arguments: Iterable[str], *, most: int | None = None) -> bytes | None:
    """What git prints, the first `most` bytes of it; None where it fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            timer = threading.Timer(_GIT_TIMEOUT_S, process.kill)  # on a disk too slow to wait for
            timer.start()
            try:
                assert process.stdout is not None
                said = process.stdout.read() if most is None else process.stdout.read(most)
                cut = most is not None and len(said) == most
                if cut:
                    process.kill()
            finally:
                timer.cancel()
    except OSError:
        return None
    return said if cut or process.returncode == 0 else None


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").split("\0") if name]


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _recorded_earlier(source: Path) -> Path | None:
    """The folder of the copied code that runs, or that of the submission, if it tells where the code comes from."""
    copies = [up for up in (source, *source.parents, *Path(__file__).parents) if up.name.startswith("code-")]
    return next((place for place in (*copies, source) if (place / RECORD).exists()), None)
