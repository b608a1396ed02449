"""What the operators' objects say of a job, in the one set of states; pure, on objects as the API server gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.jobs.job import JobStatus

Object = Mapping[str, Any]
_COMING = ("ContainerCreating", "PodInitializing")  # why a container waits that is on its way


def status_of(job: Object, *, pods: Sequence[Object] = (), workload: Object | None = None) -> JobStatus:
    """Where a JobSet, TrainJob or RayJob stands.

    pods: its own; workload: Kueue's object for it, if it is queued there
    """
    if "deletionTimestamp" in job["metadata"]:
        return JobStatus("running", "it is being deleted; its pods have time for a checkpoint")
    nodes = ",".join(dict.fromkeys(name for pod in pods if (name := pod["spec"].get("nodeName"))))
    found = _ray_job(job) if job["kind"] == "RayJob" else _job_set(job)
    if found.state in ("queued", "preempted-will-return") and workload is not None:
        found = _queued(found, workload)
    if found.state in ("queued", "starting") and (waiting := next(_waiting(pods), None)):
        found = waiting
    return JobStatus(found.state, found.reason, nodes)


def _job_set(job: Object) -> JobStatus:
    """A JobSet, or a TrainJob, whose status is that of its JobSet."""
    status = job.get("status", {})
    holds = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
    restarts = int(status.get("restarts", 0))
    again = f"restart {restarts}" if restarts else ""
    for condition in ("Completed", "Complete"):
        if condition in holds:
            return JobStatus("finished", _said(holds[condition]))
    if "Failed" in holds:
        return JobStatus("failed", _said(holds["Failed"]))
    if job["spec"].get("suspend") or "Suspended" in holds:
        return JobStatus(
            "preempted-will-return" if restarts else "queued", _said(holds.get("Suspended")) or "suspended"
        )
    parts = status.get("replicatedJobsStatus") or status.get("jobsStatus") or []
    if any(part.get("ready", 0) for part in parts):
        return JobStatus("running", again)
    if any(part.get("active", 0) for part in parts):
        return JobStatus("starting", again or "its pods are being made ready")
    if restarts:
        return JobStatus("preempted-will-return", f"{again}: its pods are being made again")
    return JobStatus("queued", "no pods yet" if status else f"no controller has taken up the {job['kind']} yet")


def _ray_job(job: Object) -> JobStatus:
    status = job.get("status", {})
    deployment, inner = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    words = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
    both = " ".join(filter(None, (f"{deployment} {inner}".strip(), f"({words})" if words else "")))
    if deployment in ("Failed", "ValidationFailed") or (deployment == "Complete" and inner == "FAILED"):
        return JobStatus("failed", both)
    if deployment == "Complete":
        return JobStatus("cancelled" if inner == "STOPPED" else "finished", both)
    if deployment in ("Retrying", "Suspending"):
        return JobStatus("preempted-will-return", both)
    if job["spec"].get("suspend") or deployment == "Suspended":
        return JobStatus("queued", both or "suspended")
    if deployment == "Running" and inner == "RUNNING":
        return JobStatus("running", both)
    if deployment:
        return JobStatus("starting", both)
    return JobStatus("queued", "no controller has taken up the RayJob yet")


def _queued(found: JobStatus, workload: Object) -> JobStatus:
    """What Kueue says of a job that it holds back: evicted before, or never yet admitted."""
    conditions = {c["type"]: c for c in workload.get("status", {}).get("conditions", [])}
    if "Evicted" in conditions:
        return JobStatus("preempted-will-return", _said(conditions["Evicted"]))
    return JobStatus(found.state, _said(conditions.get("QuotaReserved")) or found.reason)


def _waiting(pods: Sequence[Object]) -> Iterator[JobStatus]:
    """Why a pod does not run: no node takes it, or its container cannot start."""
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                yield JobStatus("queued", f"{name}: {_said(condition)}")
        for container in status.get("containerStatuses", []):
            waits = container.get("state", {}).get("waiting")
            if waits and waits.get("reason") not in _COMING:
                yield JobStatus("starting", f"{name}: {_said(waits)}")


def _said(words: Object | None) -> str:
    return ": ".join(filter(None, (words.get("reason"), words.get("message")))) if words else ""
