"""This process's folder for what must not outlive it: sockets and error files, below the temporary folder.

It goes with the process; where the process was killed, the next one that starts removes it. A lock on the folder, which
the kernel drops at any death, tells the living from the dead.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from multiprocessing import process
from pathlib import Path

_PREFIX = "launcher-"
_LONGEST_BASE = 65  # a socket's path holds 107 bytes (unix(7)); our folder and multiprocessing's file take 36
_MARK = ".launcher-scratch"  # without it a folder is somebody else's, whatever its name
_own: tuple[int, Path] | None = None  # process id, folder


def folder() -> Path:
    """The folder of this process, made at the first call."""
    global _own
    if _own is None or _own[0] != os.getpid():
        _sweep()
        _own = (os.getpid(), _make())
        atexit.register(_remove, *_own)
    return _own[1]


def adopt_multiprocessing() -> None:
    """Let multiprocessing's sockets lie there too; its own folder would stay behind a killed process.

    The key is private to multiprocessing (`util.get_temp_dir`, Python 3.11 to 3.14); children inherit it.
    """
    process.current_process()._config.setdefault("tempdir", str(folder()))  # type: ignore[attr-defined]


def _base() -> Path:
    """The temporary folder; /tmp where a socket's path would be too long below it (a scheduler's deep TMPDIR, say)."""
    usual = tempfile.gettempdir()
    return Path(usual if len(os.fsencode(usual)) <= _LONGEST_BASE else "/tmp")


def _make() -> Path:
    made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
    _lock(made)
    (made / _MARK).touch()  # after the lock: who sees it and gets the lock knows that the maker is dead
    return made


def _sweep() -> None:
    """Remove the folders of processes that have died."""
    for found in _base().glob(f"{_PREFIX}*"):
        if (found / _MARK).is_file() and (handle := _lock(found)) is not None:
            shutil.rmtree(found, ignore_errors=True)
            os.close(handle)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder of this user; None where a process holds it or it is not ours."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(handle).st_uid != os.getuid():
                raise PermissionError
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            os.close(handle)
    return None


def _remove(owner: int, path: Path) -> None:
    if os.getpid() == owner:  # a forked child has inherited the exit handler
        shutil.rmtree(path, ignore_errors=True)
