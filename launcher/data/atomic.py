"""A file that appears whole or not at all, also where several processes make it at once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends well, and is removed when not."""
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield made
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
