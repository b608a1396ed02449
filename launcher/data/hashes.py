"""The hash of a file's content, remembered for as long as the file system says that the file is the same.

Remembered by path, size, inode and the times of the last change of content and of the file itself (which no program can
set back). LAUNCHER_REHASH=1 hashes anew, for file systems that do not keep these.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import xxhash

from launcher.data.atomic import appearing

_CHUNK = 1 << 22
_SETTLED_NS = 2_000_000_000  # a file that changed later than so may change again without another time


def file_hash(file: Path, remembered: Path | None = None) -> str:
    """xxh3_128 of a file's content, in hex digits; the file is read once, in pieces, or not at all.

    Args:
        remembered: folder with what is known of files.
    """
    path = file.absolute()
    note = remembered / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.json" if remembered is not None else None
    stamp = _stamp(path)
    if note is not None and not os.environ.get("LAUNCHER_REHASH") and (known := _known(note, path, stamp)):
        return known
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    found: str = digest.hexdigest()
    if note is not None and stamp == _stamp(path) and max(stamp[2:]) < time.time_ns() - _SETTLED_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written is told of where it is needed
            note.parent.mkdir(parents=True, exist_ok=True)
            with appearing(note) as made:
                made.write_text(json.dumps({"path": str(path), "stamp": stamp, "hash": found}))
    return found


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _known(note: Path, path: Path, stamp: list[int]) -> str:
    """The hash, if the note is of this file as it is; else empty."""
    try:
        kept = json.loads(note.read_text())
        return str(kept["hash"]) if (kept["path"], kept["stamp"]) == (str(path), stamp) else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""
