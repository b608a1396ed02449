"""Space kept back for last words, so that an attempt can say how it ended on a full disk too."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

_BYTES = 16 << 10
_TRIES = 4
_PAUSE_S = 0.25


def keep_back(path: Path) -> None:
    """Fill `path` with bytes that nobody reads; where there is no space for them, there is no reserve."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(_BYTES))  # not zeros: a file system that compresses would keep nothing back


def give_up(path: Path) -> None:
    """Free the space that `keep_back` took."""
    with contextlib.suppress(OSError):
        path.unlink()


def insist(write: Callable[[], None], reserve: Path) -> None:
    """Write; if that fails, give up the reserve and try again, for a second at most.

    Raises:
        OSError: the last try's; other exceptions of `write` at once.
    """
    for left in reversed(range(_TRIES)):
        try:
            return write()
        except OSError:
            give_up(reserve)
            if not left:
                raise
            time.sleep(_PAUSE_S)
