"""Whether a run is started again: decided by the class of its end, budgets by class, and whether it gets on (L10).

The ledger is what is counted: the starts of one job, the newest last, whoever made them. A job is one submission with
all its restarts by the scheduler and by the launcher itself; by hand it is one start by a person with the launcher's
own restarts. A start that left no `end` line died without a word and counts as `node`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from launcher.errors import UserError
from launcher.jobs.ending import Ending
from launcher.recipe.schema.restart import Restart
from launcher.run.control import CANCEL, GROW, Verdict, clear_stop, stop_reason, stop_requested
from launcher.run.directory import RunDirectory, parse_checkpoint_name
from launcher.run.ledger import Attempt, attempts, latest_attempt, valid_checkpoints
from launcher.run.left_out import left_out

# classes with a key in cluster.restart
BUDGETS = ("preemption", "node", "communication", "hang", "non_finite", "out_of_memory", "data", "unknown")
RESIZE = "resize"  # class of an end that was asked for so that other nodes can be taken in; it has no budget
BY_HAND = "local"  # the target of a start that no scheduler made
_MENDED = ("user", "data", "out_of_memory", "non_finite")  # a person who starts such a job again has mended it
_OUTLIVED = ("preemption", "communication", "node", "hang", "unknown")  # what a cancel itself may have caused


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the job goes on, and why, for people; after a pause of so many seconds."""

    verdict: Verdict
    why: str
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a job.

    end: the class of its end; silent: it left no word of it
    progress: it left a newer checkpoint than it began with, or wrote down a global batch that the next leaves out
    """

    number: int
    end: str
    silent: bool
    progress: bool


def concluded(run: RunDirectory, attempt: int, ending: Ending, *, within: bool = False, enough: bool = False) -> Ending:
    """An ending as it counts, with its verdict; its `end` line is not yet written.

    within: the caller can make the next start itself, which it does where the result says `again`
    enough: the nodes that are left are enough for it also after an end of class `node`
    """
    ending = _resized(run, _cancelled(run, ending))
    limits = _limits(run)
    try:
        decision = decide(run, attempt, ending, limits)
    except OSError:  # the ledger cannot be read, so nothing can be counted
        decision = by_class(ending, limits)
    for_scheduler = ending.failure_class == "preemption" or (ending.failure_class == "node" and not enough)
    asked = stop_requested(run) and ending.failure_class != RESIZE
    again = within and decision.verdict == "requeue" and not for_scheduler and not asked
    pause = decision.pause_s if again else 0.0
    return replace(ending, verdict=decision.verdict, why=decision.why, again=again, pause_s=pause)


def decide(run: RunDirectory, attempt: int, ending: Ending, limits: Restart) -> Decision:
    """What is to happen after an attempt that ended so, while its `end` line is not yet written.

    Raises:
        OSError: the ledger cannot be read; `by_class` decides without it.
    """
    ends = {attempt: ending.failure_class or ending.status}
    return by_class(ending, limits, _starts(run, _job_of(run, attempt), reached=_newest_checkpoint(run), ends=ends))


def by_class(ending: Ending, limits: Restart, starts: Sequence[Start] = ()) -> Decision:
    """The decision, given the starts of the job with the one that ended last; none: it is taken for the first."""
    if ending.status in ("finished", "cancelled"):
        return Decision("stop", ending.message or ending.status)
    if ending.for_good:
        return Decision("stop", ending.message)
    kind = ending.failure_class or "unknown"
    if kind == RESIZE:
        return Decision("requeue", ending.message)
    if kind not in BUDGETS or (kind == "non_finite" and not ending.rolls_back):
        return Decision("stop", f"{kind}: another start would end the same way")
    starts = starts or (Start(1, kind, silent=False, progress=True),)
    if (limit := _limit_reached(starts, limits)) is not None:
        return Decision("stop", limit)
    if kind == "preemption":
        at = "before its first step" if ending.step is None else f"with a checkpoint of step {ending.step}"
        return Decision("requeue", f"preemption: stopped {at}")
    count = f"{kind}: restart {len(_of_class(starts, kind))} of {getattr(limits, kind)}"
    return Decision("requeue", count, pause_s(len(_idle(starts)), limits))


def pause_s(idle: int, limits: Restart) -> float:
    """Seconds before the next start, when so many in a row have left no newer checkpoint; none after progress."""
    if idle == 0:
        return 0.0
    doubled = min(idle - 1, 64)
    return float(min(limits.backoff_s * 2**doubled, limits.backoff_max_s))


def refusal(run: RunDirectory, attempt: int) -> Ending | None:
    """How a restart that has just begun ends at once: its job is cancelled, or the starts before it reached a limit.

    Needed beside `decide`: Slurm requeues the job of a lost node without asking for a verdict, and the job that a
    person cancelled while its node was being lost.
    """
    *before, latest = _job_of(run, attempt)
    if not before:
        return None
    if (reason := _cancel_reason(run)) is not None:
        return Ending(status="cancelled", failure_class="cancelled", message=reason)
    starts = _starts(run, before, reached=_newest_accepted(latest), ends={})
    if starts[-1].end not in BUDGETS or starts[-1].end in _MENDED:
        return None
    if (limit := _limit_reached(starts, _limits(run))) is None:
        return None
    message = f"not started again: {limit}. A new submission, or launcher resume {run.path}, counts afresh"
    return Ending(status="failed", failure_class=starts[-1].end, message=message, for_good=True)


def asked_to_stop(run: RunDirectory, ending: Ending, asker: str) -> Ending:
    """The ending of an attempt after which the next start was called off: the scheduler's, or a person's, to make."""
    if (reason := _cancel_reason(run)) is not None:
        return replace(
            ending, status="cancelled", failure_class="cancelled", message=reason, again=False, verdict="stop"
        )
    message = f"{asker} before attempt {latest_attempt(run) + 1}, which was to begin after: {ending.message}"
    return replace(
        ending, status="preempted", failure_class="preemption", step=_newest_checkpoint(run) or None, message=message,
        again=False,
    )  # fmt: skip


def forget_stop(run: RunDirectory, attempt: int) -> None:
    """A new start takes back what was asked of the one before, but a job that was cancelled does not come back.

    What was asked between two attempts of one launcher was asked of the next one, too.
    """
    *before, latest = _job_of(run, attempt)
    if latest.within or (before and _cancel_reason(run) is not None):
        return
    clear_stop(run)


def _cancelled(run: RunDirectory, ending: Ending) -> Ending:
    """The ending as it counts where a person has cancelled the job meanwhile."""
    reason = _cancel_reason(run)
    by_itself = ending.status == "failed" and ending.failure_class not in _OUTLIVED
    if reason is None or ending.status == "finished" or by_itself:
        return ending
    return replace(ending, status="cancelled", failure_class="cancelled", message=reason, traceback="")


def _resized(run: RunDirectory, ending: Ending) -> Ending:
    """The ending as it counts where the stop was asked for to go on with more nodes."""
    reason = stop_reason(run) or ""
    if ending.status != "preempted" or not reason.startswith(GROW):
        return ending
    return replace(ending, failure_class=RESIZE, message=reason)


def _cancel_reason(run: RunDirectory) -> str | None:
    reason = stop_reason(run)
    return reason if reason is not None and reason.startswith(CANCEL) else None


def _limits(run: RunDirectory) -> Restart:
    """`cluster.restart` of the run's own recipe."""
    try:
        values = run.read_recipe().get("cluster", {}).get("restart", {})
    except (OSError, UserError):
        values = {}
    known = {f.name for f in fields(Restart)}
    return Restart(**{key: value for key, value in values.items() if key in known})


def _limit_reached(starts: Sequence[Start], limits: Restart) -> str | None:
    """Which limit the last start has reached, and by which starts; None if the run may go on."""
    kind = starts[-1].end
    budget = getattr(limits, kind) if kind in BUDGETS else None
    if budget is not None and len(same := _of_class(starts, kind)) > budget:
        restarts = "restart" if budget == 1 else "restarts"
        used = f", used up by {_named(same)}" if budget else ""
        return f"{kind}: cluster.restart.{kind} allows {budget} {restarts}{used}"
    if len(idle := _idle(starts)) >= limits.no_progress:
        key = f"cluster.restart.no_progress = {limits.no_progress}"
        return f"no progress: {_named(idle)} left no newer checkpoint ({key})"
    return None


def _idle(starts: Sequence[Start]) -> Sequence[Start]:
    """The last starts in a row that left no newer checkpoint."""
    still = len(starts)
    while still and not starts[still - 1].progress:
        still -= 1
    return starts[still:]


def _of_class(starts: Sequence[Start], kind: str) -> list[Start]:
    return [start for start in starts if start.end == kind]


def _named(starts: Sequence[Start]) -> str:
    """`attempts 2 (unknown), 3 (died without a word)`"""
    said = (f"{start.number} ({'died without a word' if start.silent else start.end})" for start in starts)
    return f"attempt{'s' * (len(starts) > 1)} {', '.join(said)}"


def _job_of(run: RunDirectory, number: int) -> list[Attempt]:
    """The starts of the job that an attempt belongs to, up to that one: without a break, each a later restart."""
    known = [attempt for attempt in attempts(run) if attempt.number <= number]
    job = known[-1:]
    for earlier in reversed(known[:-1]):
        if not _is_restart(job[0], earlier):
            break
        job.insert(0, earlier)
    return job


def _is_restart(later: Attempt, earlier: Attempt) -> bool:
    """Whether the launcher or a scheduler started the later one again, and no person did under the same job id."""
    if later.job_id is None or (later.target, later.job_id) != (earlier.target, earlier.job_id):
        return False
    if later.within or later.target == BY_HAND:
        return later.within
    return later.restart is None or earlier.restart is None or later.restart > earlier.restart


def _starts(run: RunDirectory, job: Sequence[Attempt], *, reached: int, ends: dict[int, str]) -> list[Start]:
    """The starts with their ends and whether they got on, to a newer checkpoint or to another batch to leave out.

    reached: step of the newest checkpoint after the last one
    ends: of attempts whose `end` line is not yet written
    """
    rolled_back = {batch.attempt for batch in left_out(run).values()}
    after = [*(_newest_accepted(attempt) for attempt in job[1:]), reached]
    return [
        Start(
            attempt.number,
            end=ends.get(attempt.number) or (attempt.end_class if attempt.ended else None) or "node",
            silent=not attempt.ended and attempt.number not in ends,
            progress=step > _newest_accepted(attempt) or attempt.number in rolled_back,
        )
        for attempt, step in zip(job, after, strict=True)
    ]


def _newest_accepted(attempt: Attempt) -> int:
    """Step of the newest checkpoint that counted when an attempt began; 0 if there was none."""
    return max((found[0] for name in attempt.accepts if (found := parse_checkpoint_name(name))), default=0)


def _newest_checkpoint(run: RunDirectory) -> int:
    return max((checkpoint.step for checkpoint in valid_checkpoints(run)), default=0)
