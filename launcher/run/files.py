"""How a file of the run directory is written: whole or not at all, durable when it must outlive the machine, and tried
again when storage stumbles."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR}  # of network storage that comes back
FULL = {errno.ENOSPC, errno.EDQUOT}
RETRY_PAUSES_S = (0.05, 0.2, 0.8, 2.0)


def retrying(action: Callable[[], T], *, what: str | Path) -> T:
    """Do something with storage; where that fails for a reason that may pass, do it again, after ever longer pauses.

    The action begins anew each time. So what it writes goes to a fresh file: after an fsync that failed the kernel may
    take for clean what never reached the disk, and a second fsync of the same file would be believed wrongly.

    Args:
        what: name of the file or folder, for the log
    Raises:
        OSError: the last try's; one that is not in TRANSIENT, and other exceptions of the action, at once.
    """
    for pause_s in RETRY_PAUSES_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            log.warning("%s: %s; tried again", what, error.strerror)
        time.sleep(pause_s)
    return action()


def is_there(path: Path) -> bool:
    """Whether a file or folder is there; storage that does not answer is no answer.

    Raises:
        OSError: that could not be found out.
    """

    def look() -> bool:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    return retrying(look, what=path)


def read_bytes(path: Path) -> bytes:
    """All that is in a file.

    Raises:
        OSError: it cannot be read, also not in several tries.
    """
    return retrying(path.read_bytes, what=path)


def list_folder(folder: Path) -> list[str]:
    """The names in a folder; none where it is missing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return retrying(lambda: os.listdir(folder), what=folder)
    except FileNotFoundError:
        return []


def remove(path: Path) -> None:
    """Unlink a file; nothing happens if it is not there.

    Raises:
        OSError: it cannot be removed.
    """
    retrying(lambda: path.unlink(missing_ok=True), what=path)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one, never a part.

    Args:
        durable: wait for the disk, so that the new file survives a power cut, and try again when storage stumbles;
            without, the old one may come back, and the caller decides what a failure means
    Raises:
        OSError: it could not be written; the old file is untouched, or the new one is there but perhaps not durable.
    """
    data = content.encode() if isinstance(content, str) else content
    if durable:
        retrying(lambda: _replace(path, data, durable=True), what=path)
    else:
        _replace(path, data, durable=False)


def _replace(path: Path, data: bytes, *, durable: bool) -> None:
    fresh = _fresh(path)
    try:
        with open(fresh, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    if durable:
        sync_folder(path.parent)


def _fresh(path: Path) -> Path:
    """A name beside a file that nobody uses; pids repeat between hosts."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. When it fails, whoever made the names makes them again (see `retrying`).

    Raises:
        OSError: it is not known whether they are durable.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as a line, durably, by a single write.

    A last line that a crash cut short is closed first and stays as a line that `read_lines` skips: appending never
    takes away a byte, so two writers that do not see each other's locks cannot destroy what the other wrote. Where
    storage stumbles the line is appended again; one that is there twice then is read once.

    Raises:
        OSError: it could not be appended durably.
    """
    line, failed = json.dumps(values).encode() + b"\n", False

    def append() -> None:
        nonlocal failed
        again, failed = failed, True
        _append(path, line, after_failure=again)
        if again:  # the folder's fsync may be what failed: it has to have something to write
            _touch(_fresh(path))
        sync_folder(path.parent)  # always: who made the file may have been killed before

    retrying(append, what=path)


def _append(path: Path, line: bytes, *, after_failure: bool) -> None:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and (after_failure or os.pread(handle, 1, size - 1) != b"\n"):
            line = b"\n" + line  # what the last try left, whole or not, may be lost down to its last byte
        written = os.write(handle, line)
        if written != len(line):  # the next append closes the rest, and says why it cannot be done
            raise OSError(errno.EIO, f"only {written} of {len(line)} bytes could be appended", str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    os.unlink(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; none if it is missing. A line cut short by a crash is skipped.

    Raises:
        OSError: it cannot be read.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return
    yield from parse_lines(data)


def parse_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines of `data`. A part of an object is no object, so a cut line cannot count.

    A line that was appended twice, because the first time was not known to be durable, is there once.
    """
    before = b""
    for line in data.split(b"\n"):
        if not line or line == before:
            continue
        try:
            values = json.loads(line)
        except ValueError:
            continue
        before = line
        if isinstance(values, dict):
            yield values


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is missing or is not one (possible after a power cut, when not durable).

    Raises:
        OSError: it cannot be read.
    """
    try:
        values = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None
