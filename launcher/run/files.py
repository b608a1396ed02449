"""How files of a run appear: whole or not at all, and durable before anybody is told."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step; a crash leaves the old content or the new, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(fresh, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line, durable on return; a line that a crash tore is ended first, so that only it is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, separators=(",", ":")) + "\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (("\n" if torn else "") + line).encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that are whole; a missing file has none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # torn by a crash while it was appended
        if isinstance(value, dict):
            found.append(value)
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when the file is not there."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return value


def sync_folder(folder: Path) -> None:
    """Make names that appeared in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
