"""How an attempt ended, judged from what its ranks said and how they died: status, class, cause, exit code.

Whether the run is started again is decided in `launcher.jobs.restart`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER_ERROR
from launcher.jobs.silent import OUT_OF_MEMORY
from launcher.run.control import Outcome, Verdict

Status = Literal["finished", "preempted", "failed", "cancelled"]

# what ranks say when another has gone, the least telling last: never the cause while somebody names a better one
_CONSEQUENCES = ("unknown", None, "preemption", "communication")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended.

    status: finished, preempted (stopped with a durable checkpoint or before the first step, start again), failed, or
        cancelled by a person
    failure_class: of `Outcome`, or `cancelled`; None when it finished
    step: last optimizer step that a rank told of, None if none did
    rank: the one that failed first, with its node, message and traceback, the steps it had finished and when it said so
        (Unix seconds of its host, for people only)
    rolls_back: its failure is mended by going on from the last checkpoint (`Outcome`)
    for_good: no restart whatever the class, as when a person ended it at once
    verdict, why: what whoever started this process is to do once it has ended, as soon as that is decided
    again: this process makes the next start itself, so it does not end; after a pause of pause_s seconds
    """

    status: Status
    failure_class: str | None = None
    step: int | None = None
    rank: int | None = None
    node: str = ""
    message: str = ""
    traceback: str = ""
    rank_step: int | None = None
    time: float | None = None
    rolls_back: bool = False
    for_good: bool = False
    verdict: Verdict | None = None
    why: str = ""
    again: bool = False
    pause_s: float = 0.0

    @property
    def exit_code(self) -> int:
        """Of `launcher run`: 75 says that nothing is lost."""
        if self.status == "finished":
            return EXIT_FINISHED
        if self.status == "preempted":
            return EXIT_PREEMPTED
        return EXIT_USER_ERROR if self.failure_class == "user" else EXIT_FAILED

    @property
    def worker_exit_code(self) -> int:
        """Of `launcher worker`, for a scheduler that knows no files: 75 asks for another start, whatever the class."""
        if self.verdict is None or self.status == "finished":
            return self.exit_code
        if self.verdict == "requeue":
            return EXIT_PREEMPTED
        return EXIT_USER_ERROR if self.failure_class == "user" else EXIT_FAILED


def judge(outcomes: Mapping[int, Outcome], died: Mapping[int, str], *, ranks: range) -> Ending:
    """The ending of an attempt whose ranks have all gone.

    outcomes: what ranks wrote, by rank; died: how processes of this node ended that did not end well, by rank
    ranks: those that should have written an outcome
    """
    step = max((o.step for o in outcomes.values() if o.step is not None), default=None)
    silent = {rank: how for rank, how in died.items() if rank not in outcomes}
    failed = {rank: o for rank, o in outcomes.items() if o.kind == "failed"}
    telling = {
        rank: _CONSEQUENCES.index(c) if (c := o.failure_class) in _CONSEQUENCES else -1 for rank, o in failed.items()
    }
    if failed and (min(telling.values()) < 0 or not silent):
        rank = min(failed, key=lambda rank: (telling[rank], rank))
        outcome = failed[rank]
        return Ending(
            status="failed",
            failure_class=outcome.failure_class or "unknown",
            step=step,
            rank=rank,
            node=outcome.node,
            message=outcome.message,
            traceback=outcome.traceback,
            rank_step=outcome.step,
            time=outcome.time,
            rolls_back=outcome.rolls_back,
        )
    if silent:
        rank, how = min(silent.items())
        message = f"rank {rank} said nothing before its end: {how}"
        kind = "out_of_memory" if OUT_OF_MEMORY in how else "unknown"
        return Ending(status="failed", failure_class=kind, step=step, rank=rank, message=message)
    if missing := [rank for rank in ranks if rank not in outcomes]:
        message = f"rank {missing[0]} ended without a word"
        return Ending(status="failed", failure_class="unknown", step=step, rank=missing[0], message=message)
    if any(o.kind == "stopped" for o in outcomes.values()):
        return Ending(status="preempted", failure_class="preemption", step=step)
    return Ending(status="finished", step=step)
