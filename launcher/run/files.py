"""How a file of the run directory is written: whole or not at all, and durable when it must outlive the machine."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`: a reader sees the old file or the new one, never a part.

    Args:
        durable: wait for the disk, so that the new file survives a power cut; without, the old one may come back.
    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # pids repeat between hosts
    try:
        with open(fresh, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as a line, durably, by a single write.

    A last line that a crash cut short is closed first and stays as a line that `read_lines` skips: appending never
    takes away a byte, so two writers that do not see each other's locks cannot destroy what the other wrote.
    """
    line = json.dumps(values).encode() + b"\n"
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(handle, line)
        if written != len(line):  # disk full in mid-line: the next append closes the rest
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be appended")
        os.fsync(handle)
    finally:
        os.close(handle)
    if new:
        sync_folder(path.parent)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; none if it is missing. A line cut short by a crash is skipped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    yield from parse_lines(data)


def parse_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines of `data`. A part of an object is no object, so a cut line cannot count."""
    for line in data.split(b"\n"):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is missing or is not one (possible after a power cut, when not durable)."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None
