"""A submitted job as every target tells of it: its id, its state in one set of words, and who can be asked about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from launcher.errors import Problem
from launcher.jobs.spec import JobSpec, Rendered

State = Literal["queued", "starting", "running", "preempted-will-return", "finished", "failed", "cancelled", "unknown"]
ACTIVE: tuple[State, ...] = ("queued", "starting", "running", "preempted-will-return")  # the job is still to end
OVER: tuple[State, ...] = ("finished", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What was submitted, as the run remembers it.

    id: by which the target knows it
    folder: the files that were submitted
    run: the run's directory, as the nodes see it
    more: what the target needs to find the job again, as a namespace or an address
    """

    target: str
    id: str
    folder: Path
    run: Path
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Where a job stands. reason: what the target says of it, in its own words; nodes: where it runs, if known."""

    state: State
    reason: str = ""
    nodes: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a target's validation looked at.

    state: ok, bad (the job would be refused) or skipped (what would look is not here)
    """

    what: str
    state: Literal["ok", "bad", "skipped"]
    text: str = ""


class Target(Protocol):
    """What a module in `launcher.jobs.targets` offers; none imports a scheduler's library before it is called.

    One whose tool answers for many jobs in one call may also offer `statuses(jobs: Sequence[Job]) -> list[JobStatus]`.
    """

    def problems(self, spec: JobSpec) -> Iterator[Problem]:
        """What of the recipe this target cannot do: keys and values alone, no look at the machine."""

    def render(self, spec: JobSpec) -> Rendered:
        """The job as files and the command that submits them; pure, without secrets."""

    def validate(self, spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
        """What the target's own tools say of the rendered files, which lie in `folder`; submits nothing."""

    def submit(self, spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
        """One call: hand the files in `folder` over.

        Raises:
            UserError: the target refused, or what submits is not here; nothing is queued.
        """

    def status(self, job: Job) -> JobStatus:
        """Ask the target; `unknown` with the reason where it cannot be asked. Raises nothing."""

    def logs(self, job: Job) -> Iterator[str]:
        """Lines of the job's own output, beside the ranks' logs in the run directory.

        Raises:
            UserError: there is none to be had; the text says where it would be.
        """

    def cancel(self, job: Job) -> None:
        """End the job for good, with a checkpoint if the target leaves the time; it does not come back.

        `launcher cancel` has written a stop request that begins with `cancel`, where it sees the run directory.

        Raises:
            UserError: the target refused.
        """
