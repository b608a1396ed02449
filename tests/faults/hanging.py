"""Imported by a fork server whose ranks a test lets hang, in ways that no signal gives; idle until it is told to.

The file named by HANGS holds, by attempt, how rank 1 stands still once it has made three steps.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from launcher.trainer import loop, rows

FILE = "HANGS"
RANK, STEPS = 1, 3
ROWS = 2  # of a step on each rank
FOR_EVER_S = 3600
_attempt = _first = -1
_taken = 0


def hold_the_lock() -> None:
    """C code that does not come back, and keeps Python's lock meanwhile."""
    while True:  # a signal ends a sleep
        ctypes.PyDLL(None).sleep(FOR_EVER_S)


def sleep_in_python() -> None:
    time.sleep(FOR_EVER_S)


def wait_for_a_record() -> None:
    time.sleep(FOR_EVER_S)


def _wanted(attempt: int, *ways: str) -> str | None:
    if os.environ.get("RANK") != str(RANK) or not (file := os.environ.get(FILE)):
        return None
    how = json.loads(Path(file).read_text()).get(str(attempt))
    return how if how in ways else None


def _accumulate(t: Any, batch: Any) -> Any:
    global _attempt, _first
    if _attempt < 0:
        _attempt, _first = t.attempt, t.step
    if t.step == _first + STEPS and (how := _wanted(t.attempt, "lock", "sleep")):
        {"lock": hold_the_lock, "sleep": sleep_in_python}[how]()
    return _real_accumulate(t, batch)


def _to_batch(*args: Any, **more: Any) -> Any:
    global _taken
    _taken += _attempt >= 0
    if _taken > STEPS * ROWS and _wanted(_attempt, "data"):
        wait_for_a_record()
    return _real_to_batch(*args, **more)


_real_accumulate, _real_to_batch = loop.accumulate, rows.to_batch
loop.accumulate, rows.to_batch = _accumulate, _to_batch
