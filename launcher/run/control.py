"""Words between processes that share nothing but the run directory: stop requests, outcomes of ranks, the verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic

FailureClass = Literal[
    "user", "data", "out_of_memory", "non_finite", "hang", "communication", "node", "preemption", "unknown"
]
Verdict = Literal["requeue", "stop"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended.

    kind: stopped is a durable checkpoint after a stop request
    failure_class: decides what a restart does; None unless it failed
    step: optimizer steps done
    message: one line for people; traceback: for those who mend it; node: where it ran
    """

    kind: Literal["finished", "stopped", "failed"]
    failure_class: FailureClass | None = None
    step: int | None = None
    message: str = ""
    traceback: str = ""
    node: str = ""


def request_stop(run: RunDirectory, reason: str) -> None:
    """Ask the ranks to checkpoint and stop at the next step boundary."""
    write_atomic(_stop_file(run), reason + "\n")


def stop_requested(run: RunDirectory) -> bool:
    """Somebody asked for it; one stat call."""
    return _stop_file(run).exists()


def stop_reason(run: RunDirectory) -> str | None:
    """Why, in the asker's words; None when nobody asked."""
    try:
        return _stop_file(run).read_text().strip()
    except FileNotFoundError:
        return None


def clear_stop(run: RunDirectory) -> None:
    """Forget an earlier request; a new attempt does this before its ranks start."""
    _stop_file(run).unlink(missing_ok=True)


def write_outcome(run: RunDirectory, attempt: int, rank: int, outcome: Outcome) -> None:
    """Say how a rank ended."""
    write_atomic(_outcomes(run) / f"{attempt}-{rank}.json", json.dumps(asdict(outcome), indent=2) + "\n")


def read_outcomes(run: RunDirectory, attempt: int) -> dict[int, Outcome]:
    """Rank to outcome, of the ranks that said how they ended; a rank that was killed is missing."""
    known = {f.name for f in fields(Outcome)}
    found = {}
    for path in _outcomes(run).glob(f"{attempt}-*.json"):
        value = read_json(path)
        if value is not None:
            found[int(path.stem.split("-")[1])] = Outcome(**{k: v for k, v in value.items() if k in known})
    return dict(sorted(found.items()))


def write_verdict(run: RunDirectory, verdict: Verdict) -> None:
    """One word for shell scripts when an attempt has ended: start me again, or do not."""
    write_atomic(_verdict_file(run), verdict + "\n")


def read_verdict(run: RunDirectory) -> str | None:
    """The word; None while an attempt runs or when its node died."""
    try:
        return _verdict_file(run).read_text().strip()
    except FileNotFoundError:
        return None


def clear_verdict(run: RunDirectory) -> None:
    """A new attempt starts without one, so that a dead node leaves none behind."""
    _verdict_file(run).unlink(missing_ok=True)


def _stop_file(run: RunDirectory) -> Path:
    return run.control / "stop-request"


def _outcomes(run: RunDirectory) -> Path:
    return run.control / "outcome"


def _verdict_file(run: RunDirectory) -> Path:
    return run.control / "verdict"
