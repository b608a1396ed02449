"""A scheduler that is a dict: stands in for a target in tests of what is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import Problem, UserError
from launcher.jobs.job import Finding, Job, JobStatus
from launcher.jobs.spec import JobSpec, Rendered

answers: list[JobStatus] = []  # what it says of every job; the last one again and again
called: list[str] = []
findings: list[Finding] = []
faults: list[Problem] = []
refusal: list[str] = []


def reset() -> None:
    """As if nothing had been submitted."""
    for of_a_test in (answers, called, findings, faults, refusal):
        of_a_test.clear()


def problems(spec: JobSpec) -> Iterator[Problem]:
    yield from faults


def render(spec: JobSpec) -> Rendered:
    return Rendered({**spec.files, "job.txt": f"{spec.name}, number {spec.submission}\n"}, "queue job.txt")


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    assert (folder / "job.txt").read_text() == rendered.files["job.txt"]
    yield from findings


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    called.append("submit")
    if refusal:
        raise UserError(refusal[0])
    return Job(target=spec.cluster.target, id=f"j{spec.submission}", folder=folder, run=Path(spec.run))


def status(job: Job) -> JobStatus:
    return statuses([job])[0]


def statuses(jobs: Sequence[Job]) -> list[JobStatus]:
    called.append(f"status {' '.join(job.id for job in jobs)}")
    if not answers:
        raise RuntimeError("the controller is away")
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    return [answer] * len(jobs)


def logs(job: Job) -> Iterator[str]:
    yield from (f"{job.id} line {number}" for number in range(5))


def cancel(job: Job) -> None:
    called.append(f"cancel {job.id}")
