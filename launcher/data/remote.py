"""Files that lie elsewhere, as s3://, gs:// or https://: listed, told apart by what the store says, and fetched."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.data.atomic import appearing
from launcher.errors import UserError

_STAMPS = (
    "ETag", "etag", "md5Hash", "crc32c", "checksum", "generation", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip


class Address(str):
    """Of a file in another store; a text, because a Path would make one of its two slashes."""

    @property
    def suffix(self) -> str:
        return PurePosixPath(self).suffix


def is_remote(path: str) -> bool:
    """Whether a path names a store and not this machine."""
    return "://" in path


def list_files(path: str) -> list[Address]:
    """Addresses of a file, of all files in a folder, or of those that a pattern matches, in order of name.

    Raises:
        UserError: the store cannot be reached, or nothing lies there.
    """
    system, inside = _open(path)
    try:
        if any(c in inside for c in "*?["):
            found = [p for p in system.glob(inside) if not system.isdir(p)]
        elif system.isdir(inside):
            found = system.find(inside)
        else:
            found = [inside] if system.exists(inside) else []
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{path}: cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(f"{path}: no such file or folder.")
    return sorted(Address(system.unstrip_protocol(p)) for p in found)


def stamp(path: str) -> str:
    """What changes when a file does: its size and what the store says of its content."""
    system, inside = _open(path)
    info = system.info(inside)
    return repr((info.get("size"), next(((k, str(info[k])) for k in _STAMPS if info.get(k)), None)))


def fetch(path: str, target: Path) -> Path:
    """Copy a file here.

    Raises:
        UserError: it cannot be read.
    """
    system, inside = _open(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with system.open(inside, "rb") as source, appearing(target) as made, open(made, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 22)
    except OSError as error:
        raise UserError(f"{path}: cannot be fetched: {type(error).__name__}: {error}") from error
    return target


def _open(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(
            f"{path}: this store needs a package that is not installed: {error}. Install the extra: "
            f"pip install 'train-launcher[cloud]'."
        ) from error
    except Exception as error:
        raise UserError(f"{path}: cannot be opened: {type(error).__name__}: {error}") from error
    return system, inside
