"""What to say when the disk of the stores is full, wherever that shows: in our writes, a library's or a worker's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import UserError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}


@contextmanager
def space_watched(cache: Path) -> Iterator[None]:
    """Make a full disk a message that names data.cache_dir and says what to do.

    Raises:
        UserError: a write below `cache` found no space.
    """
    try:
        yield
    except OSError as error:
        if full_disk(error) is None:
            raise
        raise UserError(
            f"data.cache_dir = {cache}: {_FULL[error.errno or 0]}. Free space there, or set data.cache_dir or "
            f"LAUNCHER_CACHE to a folder on another disk. What is tokenised already is kept."
        ) from error


def full_disk(error: BaseException) -> OSError | None:
    """The error, or the one that led to it, as a plain OSError, if that is a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return OSError(seen.errno, seen.strerror, seen.filename)
        seen = seen.__cause__ or seen.__context__
    return None
