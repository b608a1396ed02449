"""What signals mean to the launcher: checkpoint and stop; a second Ctrl-C: end at once. None is forwarded to ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Signals:
    """Between `with` and its end, signals only leave a note here; the supervisor reads it.

    stop: why to stop, or None; passed_on: the ranks have been asked; at_once: a second Ctrl-C came
    Outside the main thread (an embedding program's) signals stay as they are.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        self.at_once = False
        self.passed_on = False
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGTERM:  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self.at_once = self._interrupts > 1
        if self.stop is None:
            self.stop = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
