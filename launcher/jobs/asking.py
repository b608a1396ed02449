"""What targets say of jobs now, each target asked once; whatever goes wrong while asking is the state `unknown`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from launcher.jobs import targets
from launcher.jobs.job import Job, JobStatus

_AT_ONCE = 8


def ask_one(job: Job) -> JobStatus:
    """Where one job stands."""
    return ask([job])[0]


def ask(jobs: Sequence[Job]) -> list[JobStatus]:
    """Where jobs stand, in their order. A target that offers `statuses(jobs)` is called once, others once a job."""
    found: dict[int, JobStatus] = {}
    for name in sorted({job.target for job in jobs}):
        places = [i for i, job in enumerate(jobs) if job.target == name]
        found.update(zip(places, _ask(name, [jobs[i] for i in places]), strict=True))
    return [found[i] for i in range(len(jobs))]


def _ask(name: str, jobs: Sequence[Job]) -> Sequence[JobStatus]:
    try:
        target = targets.find(name)
        if together := getattr(target, "statuses", None):
            answers: Sequence[JobStatus] = together(jobs)
            return answers
        if len(jobs) == 1:
            return [target.status(jobs[0])]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(target.status, jobs))
    except Exception as error:  # a missing library, a scheduler's tool that prints something new
        return [JobStatus("unknown", f"{type(error).__name__}: {error}")] * len(jobs)
