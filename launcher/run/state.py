"""How the run stands, as the newest attempt says; what an older attempt says never counts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic
from launcher.run.ledger import Attempt, StaleAttempt, attempts, fenced

STATUSES = ("running", "preempted", "finished", "failed", "cancelled")

__all__ = ["STATUSES", "StaleAttempt", "State", "reached_end", "read_state", "write_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a run stands.

    status: running, preempted, finished, failed or cancelled; `queued` before the first attempt, `starting` before its
        first word, `restarting` between two attempts of one launcher
    attempt: of which attempt this is, 0 if there is none
    step: optimizer steps finished, None if not known
    time: Unix seconds on the host that wrote it, for people only
    more: further fields of state.json, as total_steps and loss
    """

    status: str
    attempt: int
    step: int | None = None
    time: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


def write_state(run: RunDirectory, status: str, *, attempt: int, step: int | None, **more: Any) -> None:
    """Replace state.json; durable unless the status is `running`.

    Raises:
        StaleAttempt: a newer attempt has started; nothing was written.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r}: expected one of {', '.join(STATUSES)}")
    values = {**more, "status": status, "attempt": attempt, "step": step, "time": time.time()}
    with fenced(run, attempt):
        write_atomic(run.state_file, json.dumps(values) + "\n", durable=status != "running")


def read_state(run: RunDirectory) -> State:
    """The state of the latest attempt: state.json if it is of that attempt, else what the ledger knows."""
    known = attempts(run)
    latest = known[-1] if known else None
    values = read_json(run.state_file)
    if values is None or not _counts(values, latest):
        return _from_ledger(latest)
    if latest is not None and latest.ended and values["status"] == "running":
        return _from_ledger(latest)  # the rank that should have said so was killed; the launcher saw the end
    fixed = ("status", "attempt", "step", "time")
    more = {key: value for key, value in values.items() if key not in fixed}
    return State(**{key: values.get(key) for key in fixed}, more=more)  # type: ignore[arg-type]


def reached_end(run: RunDirectory) -> bool:
    """Whether the latest attempt finished, at the last step that data.json now asks for."""
    state, data = read_state(run), read_json(run.data_file)
    if state.status != "finished" or data is None:
        return False
    return state.step is None or state.step >= data["total_steps"]


def _counts(values: dict[str, Any], latest: Attempt | None) -> bool:
    """Whether the ledger knows of no newer attempt than the one that wrote these values."""
    attempt = values.get("attempt")
    return isinstance(attempt, int) and values.get("status") in STATUSES and attempt >= (latest.number if latest else 0)


def _from_ledger(latest: Attempt | None) -> State:
    if latest is None:
        return State(status="queued", attempt=0)
    if not latest.ended:
        return State(status="starting", attempt=latest.number, time=latest.time)
    status = {"finished": "finished", "preemption": "preempted", "cancelled": "cancelled"}.get(
        latest.end_class or "", "restarting" if latest.end_again else "failed"
    )
    return State(status=status, attempt=latest.number, step=latest.end_step, time=latest.end_time)
