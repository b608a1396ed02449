"""The attempts of a run and which checkpoints count: the ledger's latest `start` line decides, nothing else.

A new attempt writes down the checkpoints it accepts. A checkpoint counts if its marker is there and it is of the latest
attempt or on that list; so one committed later by an older attempt is void, and stays void in every attempt after.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.run.directory import MARKER, RunDirectory, parse_checkpoint_name
from launcher.run.files import append_line, is_there, list_folder, read_lines, remove, retrying, write_atomic

LOCK_WAIT_S = 5.0
_LOCK_PAUSE_S = 0.01
_TRACEBACK_CHARACTERS = 4000  # its end is what tells, and the line has to fit into the reserve
_CLASS_OF: dict[str | None, str] = {None: "finished", "stopped": "preemption", "preempted": "preemption"}


class StaleAttempt(Exception):
    """A newer attempt of the run has started: this one may not change it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a run, as its two ledger lines tell.

    number: from 1; target, job_id: who started it and under which name (None: by hand)
    restart: how often its scheduler had started the job again before, 0 at first; None: not known
    within: the launcher of the attempt before started it, without ending in between
    nodes: host names, or their count where the names are not known yet
    reason: why it was started; accepts: names of the checkpoint folders that counted then
    time, end_time: Unix seconds on the host that wrote the line, for people only
    ended: whether there is an `end` line; without one it runs or was killed
    end_step, end_class: last finished step; `finished`, `cancelled` or the class of its failure, as in `Outcome`
    end_verdict, end_why: whether it was to be started again, and why (None, empty: written by launcher 0.2 or older)
    end_again: whether the launcher that saw the end was to make the next start itself
    end_first: the rank that failed first, as `Failure`; None where no rank did, or launcher 0.4 or older wrote the line
    """

    number: int
    target: str = ""
    job_id: str | None = None
    restart: int | None = None
    within: bool = False
    nodes: Any = None
    reason: str = ""
    accepts: tuple[str, ...] = ()
    time: float | None = None
    host: str = ""
    pid: int | None = None
    launcher_version: str = ""
    ended: bool = False
    end_step: int | None = None
    end_class: str | None = None
    end_time: float | None = None
    end_verdict: str | None = None
    end_why: str = ""
    end_again: bool = False
    end_first: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong first in an attempt.

    rank, node: where; None, empty: the launcher itself saw it
    step: optimizer steps that the rank had finished; None: not known
    failure_class: as in `Outcome`
    time: Unix seconds on the host where it was seen, for people only
    """

    rank: int | None = None
    node: str = ""
    step: int | None = None
    failure_class: str = "unknown"
    message: str = ""
    traceback: str = ""
    time: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class CheckpointRef:
    """A checkpoint that counts; its bytes are verified by whoever loads it."""

    step: int
    attempt: int
    path: Path


def start_attempt(
    run: RunDirectory,
    *,
    target: str,
    job_id: str | None,
    nodes: Any,
    reason: str,
    restart: int | None = None,
    within: bool = False,
) -> int:
    """Begin the next attempt, durably; the caller holds the lease. The verdict of the attempt before is cleared.

    within: the launcher that saw the end of the attempt before starts this one

    Returns:
        Its number, from 1.
    """
    with ledger_lock(run):
        accepts = [checkpoint.path.name for checkpoint in valid_checkpoints(run)]
        # folders count too: a number must not come back even if the ledger was lost
        number = 1 + max([latest_attempt(run), *(attempt for _, attempt, _ in _folders(run))])
        line = {
            "kind": "start", "attempt": number, "target": target, "job_id": job_id, "restart": restart,
            "within": within, "nodes": nodes, "reason": reason, "accepts": accepts, "time": time.time(),
            "host": socket.gethostname(), "pid": os.getpid(), "launcher_version": __version__,
        }  # fmt: skip
        append_line(run.ledger_file, line)
        remove(run.control / "verdict")
    return number


def end_attempt(
    run: RunDirectory,
    attempt: int,
    *,
    step: int | None,
    outcome_class: str | None,
    verdict: str | None = None,
    why: str = "",
    again: bool = False,
    first: Failure | None = None,
) -> None:
    """Write down how an attempt ended; a late line of an older attempt is about that attempt alone.

    Args:
        outcome_class: the class of its failure, None when it reached its last step; the words of outcomes and states
            serve too: `finished`, and `stopped` or `preempted` for `preemption`
        verdict, why: whether the run is to be started again, as `launcher.jobs.restart` decided
        again: whether the caller starts it again itself
        first: what went wrong first; of its traceback the end is kept
    """
    with ledger_lock(run):
        outcome_class = _CLASS_OF.get(outcome_class, outcome_class)
        line = {
            "kind": "end", "attempt": attempt, "step": step, "class": outcome_class, "verdict": verdict, "why": why,
            "again": again, "time": time.time(),
        }  # fmt: skip
        if first is not None:
            values = asdict(replace(first, traceback=first.traceback[-_TRACEBACK_CHARACTERS:]))
            line["first"] = {"class" if key == "failure_class" else key: value for key, value in values.items()}
        append_line(run.ledger_file, line)


def record_changes(
    run: RunDirectory, changes: Sequence[dict[str, Any]], *, step: int | None, forced: Sequence[str]
) -> None:
    """Write down what a run goes on with that was another before; the attempts that follow are with it.

    Args:
        changes: what, old, new and effect of each
        step: of the newest checkpoint, None where there is none
        forced: what of them makes it another run, and was forced
    """
    with ledger_lock(run):
        line = {
            "kind": "change", "step": step, "changes": list(changes), "forced": list(forced), "time": time.time(),
            "host": socket.gethostname(), "launcher_version": __version__,
        }  # fmt: skip
        append_line(run.ledger_file, line)


def attempts(run: RunDirectory) -> list[Attempt]:
    """All attempts by number. Unknown fields and kinds of lines, of a later version, are passed over."""
    starts: dict[int, dict[str, Any]] = {}
    ends: dict[int, dict[str, Any]] = {}
    for line in read_lines(run.ledger_file):
        if not isinstance(number := line.get("attempt"), int):
            continue
        if line.get("kind") == "start":
            starts.setdefault(number, line)
        elif line.get("kind") == "end":
            ends.setdefault(number, line)
    return [_attempt(starts[number], ends.get(number)) for number in sorted(starts)]


def latest_attempt(run: RunDirectory) -> int:
    """Number of the newest attempt, 0 if there is none."""
    return max((attempt.number for attempt in attempts(run)), default=0)


def valid_checkpoints(run: RunDirectory) -> list[CheckpointRef]:
    """The checkpoints that count, ascending by (step, attempt)."""
    return [ref for ref in counting(run, (path.name for *_, path in _folders(run))) if is_there(ref.path / MARKER)]


def counting(run: RunDirectory, names: Iterable[str]) -> list[CheckpointRef]:
    """Those of these folders' names that would count, were they here and committed, ascending by (step, attempt)."""
    if not (known := attempts(run)):
        return []
    latest = known[-1]
    parsed = ((name, parse_checkpoint_name(name)) for name in names)
    return sorted(
        CheckpointRef(*key, run.checkpoints / name)
        for name, key in parsed
        if key and (key[1] == latest.number or name in latest.accepts)
    )


def lost_beginnings(run: RunDirectory) -> list[str]:
    """Names of committed checkpoints of attempts that the ledger does not know: it was lost, or cut off.

    An attempt is written down durably before it commits anything, so a whole ledger knows them all.
    """
    numbers = {attempt.number for attempt in attempts(run)}
    accepted = {name for attempt in attempts(run) for name in attempt.accepts}
    return [
        path.name
        for _, number, path in sorted(_folders(run))
        if number not in numbers and path.name not in accepted and is_there(path / MARKER)
    ]


def missing_checkpoints(run: RunDirectory) -> list[str]:
    """Names of the checkpoints that the newest attempt began with, where none of them nor any later one is here."""
    known = attempts(run)
    return list(known[-1].accepts) if known and not valid_checkpoints(run) else []


def take_over(run: RunDirectory, *, reason: str) -> list[str]:
    """Write one attempt into a ledger that was lost: it accepts every committed checkpoint, and has ended.

    Returns:
        Names of the checkpoints. The caller holds the lease and has verified them.
    """
    with ledger_lock(run):
        names = [path.name for *_, path in sorted(_folders(run)) if is_there(path / MARKER)]
        number = 1 + max([latest_attempt(run), *(attempt for _, attempt, _ in _folders(run))])
        line = {
            "kind": "start", "attempt": number, "target": "repair", "job_id": None, "restart": None, "nodes": 1,
            "reason": reason, "accepts": names, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(),
            "launcher_version": __version__,
        }  # fmt: skip
        append_line(run.ledger_file, line)
    end_attempt(run, number, step=None, outcome_class="unknown", verdict="stop", why=reason)
    return names


@contextmanager
def fenced(run: RunDirectory, attempt: int) -> Iterator[None]:
    """While this is held no newer attempt begins: for short changes that only the newest attempt may make.

    Raises:
        StaleAttempt: a newer attempt has started.
    """
    with ledger_lock(run):
        if (latest := latest_attempt(run)) > attempt:
            raise StaleAttempt(f"{run.path}: attempt {attempt} is over, attempt {latest} has started")
        yield


@contextmanager
def ledger_lock(run: RunDirectory, *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """One at a time at the ledger and the state.

    A process that was stopped while it held the lock must not hold up the run for ever, so after `wait_s` the lock
    file is replaced. That is safe: the lock only makes a stale writer notice early; attempt numbers decide what
    counts.
    """
    retrying(lambda: run.control.mkdir(parents=True, exist_ok=True), what=run.control)
    path = run.control / "ledger.lock"
    deadline = time.monotonic() + wait_s
    while (handle := retrying(lambda: _try_lock(path), what=path)) is None:
        if time.monotonic() >= deadline:
            write_atomic(path, b"", durable=False)
            deadline = time.monotonic() + wait_s
        time.sleep(_LOCK_PAUSE_S)
    try:
        yield
    finally:
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):  # not one that was replaced meanwhile
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _folders(run: RunDirectory) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of everything below checkpoints/ that is named like one."""
    parsed = ((parse_checkpoint_name(name), run.checkpoints / name) for name in list_folder(run.checkpoints))
    return [(*key, path) for key, path in parsed if key]


def _attempt(start: dict[str, Any], end: dict[str, Any] | None) -> Attempt:
    end_fields: dict[str, Any] = {}
    if end is not None:
        end_fields = {f"end_{key}": end.get(key) for key in ("step", "class", "time", "verdict")}
        end_fields |= {"end_why": end.get("why") or "", "end_again": end.get("again") is True}
        end_fields["end_first"] = _failure(end.get("first"))
    return Attempt(
        number=start["attempt"], target=start.get("target", ""), job_id=start.get("job_id"),
        restart=start.get("restart"), within=start.get("within") is True, nodes=start.get("nodes"),
        reason=start.get("reason", ""), accepts=tuple(start.get("accepts", ())), time=start.get("time"),
        host=start.get("host", ""), pid=start.get("pid"), launcher_version=start.get("launcher_version", ""),
        ended=end is not None, **end_fields,
    )  # fmt: skip


def _failure(values: Any) -> Failure | None:
    if not isinstance(values, dict):
        return None
    values = {**values, "failure_class": values.get("class") or "unknown"}
    return Failure(**{f.name: values[f.name] for f in fields(Failure) if f.name in values})
