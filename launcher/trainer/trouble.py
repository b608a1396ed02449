"""What a rank does when something beside the training cannot be written: it says so once, and goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Trouble:
    """One thing that is written again and again, and how that goes.

    Args:
        what: its name in the warning
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._failing = False

    @contextlib.contextmanager
    def said(self) -> Iterator[None]:
        """Write in here: an OSError ends the block and is said, once until a block has gone well again."""
        try:
            yield
        except OSError as error:
            if not self._failing:
                reason = error.strerror or str(error)
                print(
                    f"warning: {self._what} cannot be written ({reason}). Training goes on and it is tried again.",
                    flush=True,
                )
            self._failing = True
        else:
            self._failing = False
