"""How a run stands: written by rank 0 of the newest attempt alone, and read so that no older attempt's word counts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic
from launcher.run.ledger import attempts, latest_attempt, locked

Status = Literal["running", "preempted", "finished", "failed"]
_STATUS_OF_CLASS: dict[str, Status] = {"finished": "finished", "preemption": "preempted"}


class StaleAttempt(Exception):
    """A newer attempt of the run has started; this process must stop writing."""


@dataclass(frozen=True, slots=True)
class State:
    """How the newest attempt stands.

    status: None when it has not said anything yet, or died before it could
    more: whatever else the writer said
    """

    status: Status | None
    attempt: int
    step: int | None = None
    time: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


def write_state(run: RunDirectory, status: Status, *, attempt: int, step: int | None, **more: Any) -> None:
    """Replace state.json.

    Raises:
        StaleAttempt: a newer attempt has started; nothing was written.
    """
    with locked(run):
        newest = latest_attempt(run)
        if attempt < newest:
            raise StaleAttempt(f"attempt {attempt} of {run.path} has been superseded by attempt {newest}")
        value = {**more, "status": status, "attempt": attempt, "step": step, "time": time.time()}
        write_atomic(run.state_file, json.dumps(value, indent=2) + "\n")


def read_state(run: RunDirectory) -> State:
    """What the newest attempt said last; else its end line in the ledger; never an older attempt's."""
    known = attempts(run)
    newest = known[-1] if known else None
    value = read_json(run.state_file)
    if value is not None and (newest is None or value["attempt"] == newest.number):
        more = {key: v for key, v in value.items() if key not in ("status", "attempt", "step", "time")}
        return State(value["status"], value["attempt"], value["step"], value["time"], more)
    if newest is None or not newest.ended:
        return State(None, newest.number if newest else 0)
    status = _STATUS_OF_CLASS.get(newest.outcome_class or "", "failed")
    return State(status, newest.number, newest.step, newest.end_time)
