"""Text output that outlives a full disk: what a file does not take waits in memory and follows."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable

_LIMIT_BYTES = 1 << 20  # of text that waits
_LOST = b"[lines are missing here: the disk was full]\n"


class PatientStream(io.TextIOBase):
    """A text stream on a descriptor whose writes never raise; a reader that has gone loses what comes after.

    Args:
        trouble: called once with the reason when a write fails, and again only after one has gone well
        mask: what becomes of each text before it is written
    """

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(
        self,
        handle: int,
        trouble: Callable[[str], None] = lambda reason: None,
        mask: Callable[[str], str] = lambda text: text,
    ) -> None:
        self._handle, self._trouble, self._mask = handle, trouble, mask
        self._waiting = b""
        self._failing = False
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Take the text; whole lines go out at once."""
        with self._lock:
            self._waiting += self._mask(text).encode(errors="replace")
            if "\n" in text:
                self.flush()
            if len(self._waiting) > _LIMIT_BYTES:
                self._waiting = _LOST + self._waiting[-_LIMIT_BYTES // 2 :].partition(b"\n")[2]
        return len(text)

    def flush(self) -> None:
        """Write what waits, as far as there is space."""
        with self._lock:
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(self._handle, self._waiting) :]
                    self._failing = False
            except BrokenPipeError:
                self._waiting = b""
            except OSError as error:
                failed_before, self._failing = self._failing, True
                if not failed_before:
                    self._trouble(error.strerror or str(error))

    def fileno(self) -> int:
        return self._handle

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._handle)
