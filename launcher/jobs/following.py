"""Waiting for a submitted job: what its target says as that changes, and the exit code of its end."""

from __future__ import annotations

import time
from collections.abc import Callable

from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER_ERROR
from launcher.jobs.asking import ask_one, last_attempt, settled
from launcher.jobs.job import OVER, Job, JobStatus
from launcher.run.ledger import Attempt

_FIRST_S, _LONGEST_S, _LONGER = 0.2, 10.0, 1.3  # between two looks


def follow(job: Job, say: Callable[[str], None]) -> int:
    """Say each change of a job's state until it is over; the exit code that says how, as of `launcher run`."""
    before, pause_s = JobStatus("unknown"), _FIRST_S
    while (status := _now(job)).state not in OVER:
        if status != before:
            say(_line(job, status))
            before, pause_s = status, _FIRST_S
        time.sleep(pause_s)
        pause_s = min(_LONGEST_S, pause_s * _LONGER)
    say(_line(job, status))
    return exit_code(status, last_attempt(job))


def _now(job: Job) -> JobStatus:
    """What the target says; where it knows nothing any more, as a scheduler after some minutes, the ledger."""
    status = ask_one(job)
    return (settled(job) or status) if status.state == "unknown" else status


def exit_code(status: JobStatus, last: Attempt | None) -> int:
    """0 finished, 75 stopped with a checkpoint to go on from, 2 a mistake in recipe or data, 1 every other end."""
    if status.state == "finished":
        return EXIT_FINISHED
    by_class = {"preemption": EXIT_PREEMPTED, "user": EXIT_USER_ERROR}
    return by_class.get((last.end_class if last else None) or "", EXIT_FAILED)


def _line(job: Job, status: JobStatus) -> str:
    where = f" on {status.nodes}" if status.nodes else ""
    reason = f": {status.reason}" if status.reason else ""
    return f"{job.target} job {job.id} {status.state}{where}{reason}"
