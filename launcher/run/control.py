"""The small files by which launcher, ranks and batch scripts talk: stop request, outcomes of ranks, verdict."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic
from launcher.run.ledger import fenced
from launcher.run.reserve import give_up, insist

Kind = Literal["finished", "stopped", "failed"]
FailureClass = Literal[
    "user", "data", "out_of_memory", "non_finite", "hang", "communication", "node", "preemption", "unknown"
]
Verdict = Literal["requeue", "stop"]
CANCEL = "cancel"  # how the reason of a stop request begins that is for good
GROW = "more nodes"  # the same of one after which the run goes on with them
_TRACEBACK_CHARACTERS = 8000  # its end is what tells, and it has to fit into the reserve
CONSEQUENCES = ("communication", "preemption", "unknown", None)  # what ranks say when another one has gone


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended.

    kind: `stopped` is a durable checkpoint before the last step
    failure_class: what decides whether a restart can help; None unless it failed
    step: optimizer steps finished
    rolls_back: the failure is mended by going on from the last checkpoint; what is left out then is written down
    time: Unix seconds on the rank's host when it was written, for people only
    """

    kind: str
    failure_class: str | None = None
    step: int | None = None
    message: str = ""
    traceback: str = ""
    node: str = ""
    rolls_back: bool = False
    time: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if self.failure_class is not None and self.failure_class not in get_args(FailureClass):
            allowed = ", ".join(get_args(FailureClass))
            raise ValueError(f"failure_class {self.failure_class!r}: expected one of {allowed}")


def request_stop(run: RunDirectory, reason: str) -> None:
    """Ask the ranks for a checkpoint and a stop at the next step boundary; asking again changes only the reason.

    A cancel stays one, whatever signal follows. On a full disk the request is an empty file: its presence is what
    counts.
    """
    if (stop_reason(run) or "").startswith(CANCEL):
        return
    run.control.mkdir(parents=True, exist_ok=True)
    try:
        write_atomic(run.control / "stop-request", json.dumps({"reason": reason, "time": time.time()}) + "\n")
    except OSError:
        (run.control / "stop-request").touch()


def stop_requested(run: RunDirectory) -> bool:
    """Whether a stop is asked for; one stat call. A batch script asks by `touch control/stop-request`."""
    return os.path.exists(run.control / "stop-request")


def stop_reason(run: RunDirectory) -> str | None:
    """Why a stop is asked for: empty if the asker did not say, None if no stop is asked for."""
    if not stop_requested(run):
        return None
    values = read_json(run.control / "stop-request") or {}
    return str(values.get("reason", ""))


def clear_stop(run: RunDirectory) -> None:
    """Take a stop request back; nothing happens if there is none."""
    (run.control / "stop-request").unlink(missing_ok=True)


def write_outcome(run: RunDirectory, attempt: int, rank: int, outcome: Outcome) -> None:
    """Say how a rank of an attempt ended, durably; the files of one attempt say nothing about another.

    The rank's reserve, if there is one, is given up for it.

    Raises:
        OSError: it could not be written in spite of that.
    """
    folder, reserve = run.control / "outcome", run.rank_reserve(rank)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = replace(outcome, traceback=outcome.traceback[-_TRACEBACK_CHARACTERS:], time=time.time())
    text = json.dumps(asdict(outcome)) + "\n"
    insist(lambda: write_atomic(folder / f"{attempt}-{rank}.json", text), reserve)
    give_up(reserve)


def read_outcomes(run: RunDirectory, attempt: int) -> dict[int, Outcome]:
    """What the ranks of an attempt said of their end, by rank; those that were killed are missing."""
    folder = run.control / "outcome"
    found: dict[int, Outcome] = {}
    for name in os.listdir(folder) if folder.exists() else ():
        match = re.fullmatch(rf"{attempt}-(\d+)\.json", name)
        if match and (values := read_json(folder / name)) is not None:
            found[int(match[1])] = _outcome(values)
    return dict(sorted(found.items()))


def first_failure(outcomes: Mapping[int, Outcome]) -> tuple[int, Outcome] | None:
    """The rank that failed and its outcome; one that only lost the others comes after one that names a cause."""
    failed = [(rank, outcome) for rank, outcome in outcomes.items() if outcome.kind == "failed"]
    return min(failed, key=lambda item: (item[1].failure_class in CONSEQUENCES, item[0]), default=None)


def write_verdict(run: RunDirectory, verdict: Verdict, *, attempt: int | None = None) -> None:
    """One word for a scheduler's script, written when an attempt ends: start the run again or not.

    Args:
        attempt: whose verdict it is
    Raises:
        StaleAttempt: `attempt` is given and a newer one has started; nothing was written.
    """
    if verdict not in get_args(Verdict):
        raise ValueError(f"verdict {verdict!r}: expected requeue or stop")
    run.control.mkdir(parents=True, exist_ok=True)
    if attempt is None:
        write_atomic(run.control / "verdict", verdict + "\n")
        return
    with fenced(run, attempt):
        write_atomic(run.control / "verdict", verdict + "\n")


def clear_verdict(run: RunDirectory) -> None:
    """Take the last attempt's verdict away, so that its absence can tell of a dead node; nothing if there is none."""
    (run.control / "verdict").unlink(missing_ok=True)


def read_verdict(run: RunDirectory) -> str | None:
    """`requeue` or `stop`; None while an attempt runs, or when its node died."""
    try:
        return (run.control / "verdict").read_text().strip() or None
    except FileNotFoundError:
        return None


def _outcome(values: dict[str, Any]) -> Outcome:
    """An outcome from its file; a later version's class of failure reads as `unknown`, its further fields go."""
    known = {f.name: values[f.name] for f in fields(Outcome) if f.name in values}
    if known.get("failure_class") not in (None, *get_args(FailureClass)):
        known["failure_class"] = "unknown"
    return Outcome(**known)
