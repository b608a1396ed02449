"""What targets say of jobs now, each target asked once; whatever goes wrong while asking is the state `unknown`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.jobs import targets
from launcher.jobs.job import Job, JobStatus
from launcher.jobs.submissions import Submission, submissions
from launcher.run.directory import RunDirectory
from launcher.run.ledger import Attempt, attempts
from launcher.run.summary import summarise

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


def summaries(runs: Sequence[tuple[RunDirectory, Path]], *, ask_targets: bool = True) -> list[dict[str, Any]]:
    """How runs stand (docs/json.md), each with its last job and what the job's target says of it.

    runs: each with the place where its submissions lie
    ask_targets: False: no target is asked, and a job that the ledger has not seen the end of is `unknown`
    """
    found = [summarise(run) for run, _ in runs]
    last = [next(reversed(submissions(place)), None) for _, place in runs]
    known = [settled(one.job) if one is not None else None for one in last]
    open_ones = [one.job for one, status in zip(last, known, strict=True) if one is not None and status is None]
    answers = iter(ask(open_ones) if ask_targets else [JobStatus("unknown", "not asked")] * len(open_ones))
    for (run, _), summary, one, status in zip(runs, found, last, known, strict=True):
        if one is None:
            summary["job"] = None
            continue
        summary["job"] = _shape(one, status or next(answers))
        if summary["status"] == "queued" and summary["job"]["state"] in ("failed", "cancelled"):
            summary["status"] = summary["job"]["state"]  # before its first attempt
        if not run.exists():
            summary.update(path=str(run.path), updated=one.time, status=_as_run(summary["job"]["state"]))
    return found


def _as_run(state: str) -> str:
    """A job's state in the words of a run whose directory cannot be seen from here."""
    return "preempted" if state == "preempted-will-return" else state


def settled(job: Job) -> JobStatus | None:
    """How a job ended for good, as the run's own ledger says; None while only its target can tell."""
    last = last_attempt(job)
    if last is None or not last.ended:
        return None
    if last.end_class == "finished":
        return JobStatus("finished", f"attempt {last.number}")
    if last.end_class == "cancelled":
        return JobStatus("cancelled", f"attempt {last.number}")
    if last.end_verdict != "stop":
        return None
    said = str(last.end_class)
    return JobStatus("failed", last.end_why if last.end_why.startswith(f"{said}:") else f"{said}: {last.end_why}")


def last_attempt(job: Job) -> Attempt | None:
    """The last attempt that the run's ledger has of a job; None where it cannot be seen from here."""
    return next((a for a in reversed(attempts(RunDirectory(job.run))) if a.job_id == job.id), None)


def _shape(submission: Submission, status: JobStatus) -> dict[str, Any]:
    job = submission.job
    return {
        "target": job.target, "id": job.id, "state": status.state, "reason": status.reason, "nodes": status.nodes,
        "submission": submission.number, "folder": str(job.folder), "time": submission.time, "host": submission.host,
    }  # fmt: skip
