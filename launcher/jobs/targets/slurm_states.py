"""What Slurm's words for a job mean in our one set of states; asked with format strings, never as JSON.

JSON differs from release to release; `%T`, `%r` and sacct's State have been the same since 20.11. Accounting may be
off, and a job is forgotten some minutes after its end, so three commands are asked in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launcher.jobs.job import JobStatus, State

Run = Callable[[Sequence[str]], tuple[int, str, str]]  # command -> exit code, output, error

_STATES: dict[str, State] = {
    "PENDING": "queued", "REQUEUE_HOLD": "queued", "SPECIAL_EXIT": "queued", "RESV_DEL_HOLD": "queued",
    "POWER_UP_NODE": "starting", "CONFIGURING": "starting",
    "RUNNING": "running", "COMPLETING": "running", "STAGE_OUT": "running", "SIGNALING": "running",
    "RESIZING": "running", "SUSPENDED": "running", "STOPPED": "running",
    "COMPLETED": "finished",
    "FAILED": "failed", "TIMEOUT": "failed", "OUT_OF_MEMORY": "failed", "BOOT_FAIL": "failed", "DEADLINE": "failed",
    "LAUNCH_FAILED": "failed", "RECONFIG_FAIL": "failed", "UPDATE_DB": "failed", "EXPEDITING": "queued",
    "CANCELLED": "cancelled", "REVOKED": "cancelled",
    "REQUEUED": "preempted-will-return", "REQUEUE_FED": "preempted-will-return",
}  # fmt: skip
_SQUEUE = "--format=%i|%T|%r|%N"
_SACCT = "--format=JobID,State,ExitCode,NodeList"
_COME_BACK = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")  # started again by Slurm itself, where requeue is on
_HELD = ("JobHeldAdmin", "JobHeldUser", "job_requeued_in_held_state")
_UNTOLD = ("None", "(null)", "", "Unknown", "None assigned")


@dataclass(frozen=True, slots=True)
class Told:
    """What a command said of a job. restarts: how often it was started before; None: it did not say."""

    state: str = ""
    reason: str = ""
    nodes: str = ""
    exit_code: str = ""
    restarts: int | None = None
    job: str = ""


def of_cluster(name: str | None) -> list[str]:
    """The option that names one of several clusters."""
    return ["-M", name] if name else []


def ask(jobs: Sequence[str], *, cluster: str | None, run: Run) -> dict[str, Told | str]:
    """What the first of squeue, sacct and scontrol that knows a job says of it; else why none does."""
    where = of_cluster(cluster)
    code, out, error = run(["squeue", *where, "--noheader", "--states=all", f"--jobs={','.join(jobs)}", _SQUEUE])
    found: dict[str, Told | str] = {}
    for job in jobs:
        queued = from_squeue(out, job)
        if queued is None:
            found[job] = _ended(job, where, run, _said("squeue", code, error))
        elif queued.state == "PENDING":  # for the first time, or again?
            shown = from_scontrol(run(["scontrol", *where, "--oneliner", "show", "job", job])[1], job)
            found[job] = replace(queued, restarts=shown.restarts) if shown else queued
        else:
            found[job] = queued
    return found


def _ended(job: str, where: Sequence[str], run: Run, said: str) -> Told | str:
    """What is told of a job that squeue has forgotten. said: why it told nothing"""
    words = [said]
    code, out, error = run(["sacct", *where, "-X", "-n", "-P", f"--jobs={job}", _SACCT])
    if told := from_sacct(out, job):
        return told
    words.append(_said("sacct", code, error))
    code, out, error = run(["scontrol", *where, "--oneliner", "show", "job", job])
    if told := from_scontrol(out, job):
        return told
    words.append(_said("scontrol", code, error))
    return "; ".join(word for word in words if word) or f"Slurm knows no job {job} any more"


def status(told: Told | str, *, requeue: bool) -> JobStatus:
    """Our state of a job, with Slurm's words.

    requeue: whether the job comes back after a preemption or the loss of a node
    """
    if isinstance(told, str):
        return JobStatus("unknown", told)
    word = re.split(r"[\s+]", told.state, maxsplit=1)[0]  # CANCELLED by 1000, CANCELLED+
    state: State = _STATES.get(word, "unknown")
    if word in _COME_BACK:
        state = "preempted-will-return" if requeue else "failed"
    elif state == "queued" and told.restarts and told.reason not in _HELD and word == "PENDING":
        state = "preempted-will-return"
    words = [told.state, "" if told.reason in _UNTOLD else told.reason]
    if told.restarts:
        words.append(f"restart {told.restarts}")
    if state == "failed" and told.exit_code not in ("", "0:0"):
        words.append(f"exit code {told.exit_code}")
    if told.reason in _HELD or word in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        words.append(f"held; scontrol release {told.job} lets it go on")
    nodes = "" if told.nodes in _UNTOLD else told.nodes
    return JobStatus(state, ", ".join(word for word in words if word), nodes)


def from_squeue(out: str, job: str) -> Told | None:
    """The line of a job; with -M a line about the cluster comes before it."""
    for line in out.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 4 and _names(parts[0], job):
            return Told(state=parts[1], reason=parts[2], nodes=parts[3], job=job)
    return None


def from_sacct(out: str, job: str) -> Told | None:
    """The last line of a job: the earlier ones are its earlier starts."""
    found = None
    for line in out.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 4 and _names(parts[0], job):
            found = Told(state=parts[1], exit_code=parts[2], nodes=parts[3], job=job)
    return found


def from_scontrol(out: str, job: str) -> Told | None:
    """`scontrol --oneliner show job`: KEY=VALUE words."""
    for line in out.splitlines():
        values = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        array = f"{values.get('ArrayJobId')}_{values.get('ArrayTaskId')}"
        if values.get("JobState") and (_names(array, job) or _names(values.get("JobId", ""), job)):
            restarts = values.get("Restarts", "")
            return Told(
                state=values["JobState"], reason=values.get("Reason", ""), nodes=values.get("NodeList", ""),
                exit_code=values.get("ExitCode", ""), restarts=int(restarts) if restarts.isdecimal() else None, job=job,
            )  # fmt: skip
    return None


def _names(text: str, job: str) -> bool:
    """Whether an id as Slurm prints it is the job: 7, 7_2, or the waiting elements 7_[0-4,8%2]."""
    if text == job:
        return True
    match, wanted = re.fullmatch(r"(\d+)_\[?([\d,-]+)(?:%\d+)?\]?", text), re.fullmatch(r"(\d+)_(\d+)", job)
    if match is None or wanted is None or match[1] != wanted[1]:
        return False
    spans = (part.partition("-") for part in match[2].split(","))
    return any(first and int(first) <= int(wanted[2]) <= int(last or first) for first, _, last in spans)


def _said(tool: str, code: int, error: str) -> str:
    words = " ".join(error.split())
    return f"{tool}: {words}" if words else f"{tool}: exit code {code}" if code else ""
