"""Which attempts a run had, and by them which checkpoints count: the fence against writers of older attempts."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launcher import __version__
from launcher.run.directory import RunDirectory
from launcher.run.files import append_line, read_lines

MARKER = "COMMITTED"
_NAME = re.compile(r"step-(\d{8,})-a(\d+)")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run.

    number: from 1
    accepts: names of the checkpoints of earlier attempts that count from this attempt on
    ended: an `end` line is there; without one the attempt was killed or still lives
    step, outcome_class: where and how it ended; None when it did not say
    """

    number: int
    target: str = ""
    job_id: str | None = None
    nodes: Sequence[str] = ()
    reason: str = ""
    host: str = ""
    pid: int | None = None
    time: float = 0.0
    accepts: Sequence[str] = field(default_factory=tuple)
    ended: bool = False
    step: int | None = None
    outcome_class: str | None = None
    end_time: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class CheckpointRef:
    """A committed checkpoint that counts; ordered by step, then attempt."""

    step: int
    attempt: int
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


def start_attempt(run: RunDirectory, *, target: str, job_id: str | None, nodes: Sequence[str], reason: str) -> int:
    """Open the next attempt and accept the checkpoints that count now; whatever an older attempt commits later is void.

    Returns:
        Its number, from 1.
    """
    with locked(run):
        number = latest_attempt(run) + 1
        line = {
            "event": "start", "attempt": number, "target": target, "job_id": job_id, "nodes": list(nodes),
            "reason": reason,
            "accepts": [ref.name for ref in valid_checkpoints(run)], "time": time.time(), "host": socket.gethostname(),
            "pid": os.getpid(), "launcher": __version__,
        }  # fmt: skip
        append_line(run.ledger_file, line)
    return number


def end_attempt(run: RunDirectory, attempt: int, *, step: int | None, outcome_class: str) -> None:
    """Say how an attempt ended; harmless when a newer one has started, because it speaks of its own number alone."""
    with locked(run):
        line = {"event": "end", "attempt": attempt, "step": step, "class": outcome_class, "time": time.time()}
        append_line(run.ledger_file, line)


def attempts(run: RunDirectory) -> list[Attempt]:
    """All attempts in their order."""
    starts: dict[int, dict[str, object]] = {}
    ends: dict[int, dict[str, object]] = {}
    for line in read_lines(run.ledger_file):
        if isinstance(line.get("attempt"), int) and line.get("event") in ("start", "end"):
            (starts if line["event"] == "start" else ends).setdefault(line["attempt"], line)
    return [_attempt(starts[number], ends.get(number)) for number in sorted(starts)]


def latest_attempt(run: RunDirectory) -> int:
    """Number of the newest attempt; 0 when there was none."""
    return max((attempt.number for attempt in attempts(run)), default=0)


def valid_checkpoints(run: RunDirectory) -> list[CheckpointRef]:
    """Committed checkpoints that count, oldest first: those of the newest attempt and those it accepted."""
    known = attempts(run)
    newest = known[-1].number if known else 0
    accepted = set(known[-1].accepts) if known else set()
    found = [ref for ref in committed(run) if ref.attempt == newest or ref.name in accepted]
    return sorted(found)


def committed(run: RunDirectory) -> Iterator[CheckpointRef]:
    """Every checkpoint folder with a marker, void ones included."""
    if not run.checkpoints.is_dir():
        return
    for path in run.checkpoints.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / MARKER).exists():
            yield CheckpointRef(int(match[1]), int(match[2]), path)


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """One writer of ledger or state at a time, over all hosts that share the folder's locks; held for microseconds."""
    run.control.mkdir(parents=True, exist_ok=True)
    handle = os.open(run.control / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _attempt(start: dict[str, object], end: dict[str, object] | None) -> Attempt:
    keys = ("target", "job_id", "nodes", "reason", "host", "pid", "time", "accepts")
    known = {key: start[key] for key in keys if key in start}
    ending = (
        {"ended": True, "step": end.get("step"), "outcome_class": end.get("class"), "end_time": end.get("time")}
        if end
        else {}
    )
    return Attempt(number=start["attempt"], **known, **ending)  # type: ignore[arg-type]
