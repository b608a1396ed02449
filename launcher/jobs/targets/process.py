"""A job that is a background process on this machine: how `torchrun` and `accelerate` submit, ask, show and end it.

It is the rendered `job.sh` in a session of its own. A pid is only trusted together with the process's start. Where the
script alone was killed, the job is its worker, as long as that holds the run's lease; nothing starts it again then.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launcher.errors import UserError
from launcher.jobs.environment import require_train_extra, require_variables
from launcher.jobs.job import Finding, Job, JobStatus
from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered
from launcher.run.control import CANCEL, stop_reason
from launcher.run.directory import RunDirectory
from launcher.run.lease import Owner, current_owner
from launcher.run.ledger import Attempt, attempts
from launcher.run.processes import boot_id, lives, pid_namespace, start_of
from launcher.run.state import reached_end

SCRIPT = "job.sh"
OUTPUT = "job.out"
OF_ANOTHER_JOB = (ENDPOINT, *(f"LAUNCHER_{name}" for name in ("ATTEMPT", "JOB_RESTART", "NODES", "NODE_RANK")))


def look(spec: JobSpec, rendered: Rendered, *, package: str) -> Iterator[Finding]:
    """What this machine says of the scripts: whether bash reads them, and what they need that is not here.

    package: the one whose command starts the ranks
    """
    yield _readable(rendered)
    try:
        yield Finding(package, "ok", f"{version(package)} is installed here")
    except PackageNotFoundError:
        yield Finding(package, "skipped", "is not installed here; the nodes need it")
    missing = [name for name in spec.env_names if name not in os.environ]
    if missing and not spec.setup:
        yield Finding("cluster.env", "skipped", f"{', '.join(missing)} not set here; needed where the job starts")


def start(spec: JobSpec, rendered: Rendered, folder: Path, *, target: str) -> Job:
    """Start `job.sh` of a folder in the background, in a session of its own.

    Raises:
        UserError: it is a job of several nodes, or something that it needs is not here.
    """
    if spec.nodes > 1:
        raise UserError(
            f"cluster.nodes = {spec.nodes}: expected 1, because target {target} submits to this machine only. Write "
            f"the scripts where all nodes see them (launcher render ... --target {target} -o DIR), and there type\n"
            f"{_indented(rendered.command)}"
        )
    bash = _require_tools(spec)
    job_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_JOB}
    environment["LAUNCHER_JOB_ID"] = job_id
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with open(folder / OUTPUT, "ab") as output:
        process = subprocess.Popen(
            [bash, SCRIPT], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    more = {
        "host": socket.gethostname(), "boot_id": boot_id(), "pid": str(process.pid),
        "pid_start": str(start_of(process.pid) or ""), "pid_namespace": pid_namespace(),
    }  # fmt: skip
    return Job(target=target, id=job_id, folder=folder, run=Path(spec.run), more=more)


def status(job: Job) -> JobStatus:
    """Whether the process, or a worker that outlived it, lives; how it ended, as the run's ledger has it."""
    if not _here(job):
        return JobStatus("unknown", f"{job.more.get('host', 'another host')} runs it and cannot be asked from here")
    run = RunDirectory(job.run)
    worker = None if _lives(job) else _worker(job)
    over = worker is None and not _lives(job)
    last = next((attempt for attempt in reversed(attempts(run)) if attempt.job_id == job.id), None)
    if over:
        return _ended(job, run, last)
    who = f"pid {job.more['pid']}"
    if worker is not None:
        who = f"its script was killed; worker pid {worker.pid} goes on and nothing starts it again"
    if last is None:
        return JobStatus("starting", who, job.more["host"])
    return JobStatus("running", f"{who}, attempt {last.number}", job.more["host"])


def logs(job: Job) -> Iterator[str]:
    """What the script and the launcher printed; the ranks' logs are in the run directory.

    Raises:
        UserError: it is not there.
    """
    try:
        with open(job.folder / OUTPUT, errors="replace") as lines:
            yield from (line.rstrip("\n") for line in lines)
    except OSError as error:
        raise UserError(f"{job.folder / OUTPUT}: the output of job {job.id} is not there ({error.strerror}).") from None


def cancel(job: Job) -> None:
    """Ask by SIGTERM for a checkpoint and the end; the script starts nothing after that.

    Raises:
        UserError: it runs on another machine, or has ended.
    """
    if not _here(job):
        host = job.more.get("host", "another host")
        raise UserError(f"job {job.id} runs on {host}, not here: launcher cancel {job.run} there.")
    if _lives(job):
        os.kill(int(job.more["pid"]), signal.SIGTERM)
    elif (worker := _worker(job)) is not None:
        os.kill(worker.pid, signal.SIGTERM)
    else:
        raise UserError(f"job {job.id} has ended: nothing to cancel.")


def _require_tools(spec: JobSpec) -> str:
    """The path of bash, once what the job needs is found here; what set-up lines bring along is not asked for."""
    bash = shutil.which("bash")
    if bash is None:
        raise UserError("bash is not on the PATH; the job is a bash script. Install it.")
    if not spec.setup:
        require_train_extra()
        require_variables(spec.env_names)
    return bash


def _readable(rendered: Rendered) -> Finding:
    bash = shutil.which("bash")
    if bash is None:
        return Finding("bash -n", "skipped", "there is no bash here")
    named = [(name, text) for name, text in rendered.files.items() if name.endswith(".sh")]
    scripts = dict([*named[:2], named[-1]])  # those of further nodes differ in a number
    for name, text in scripts.items():
        if error := subprocess.run([bash, "-n"], input=text, capture_output=True, text=True).stderr.strip():
            return Finding("bash -n", "bad", f"{name}: {error}")
    return Finding("bash -n", "ok", f"reads {', '.join(scripts)}")


def _here(job: Job) -> bool:
    if job.more.get("pid_namespace", "") not in ("", pid_namespace()):
        return False
    return job.more.get("boot_id") == boot_id() and (bool(boot_id()) or job.more.get("host") == socket.gethostname())


def _lives(job: Job) -> bool:
    start = job.more.get("pid_start", "")
    return lives(int(job.more["pid"]), int(start) if start else None)


def _worker(job: Job) -> Owner | None:
    """The live process that drives the run as this job's worker."""
    owner, alive = current_owner(RunDirectory(job.run))
    ours = owner is not None and (owner.target, owner.job_id) == (job.target, job.id)
    return owner if ours and alive else None


def _ended(job: Job, run: RunDirectory, last: Attempt | None) -> JobStatus:
    if last is None:
        if (reason := stop_reason(run) or "").startswith(CANCEL):
            return JobStatus("cancelled", f"{reason}, before its first attempt")
        if reached_end(run):
            return JobStatus("finished", "nothing was left to do")
        return JobStatus("failed", f"ended before its first attempt: {_last_line(job)}")
    if not last.ended:
        return JobStatus("failed", f"attempt {last.number} was killed without a last word")
    match last.end_class:
        case "finished":
            return JobStatus("finished", f"attempt {last.number}")
        case "cancelled":
            return JobStatus("cancelled", f"attempt {last.number} stopped at step {last.end_step}")
        case "preemption":
            how = f"attempt {last.number} stopped at step {last.end_step}"
            return JobStatus("cancelled", f"{how}; `launcher submit {job.run}` goes on")
    return JobStatus("failed", f"attempt {last.number}: {last.end_class}")


def _last_line(job: Job) -> str:
    try:
        lines = (job.folder / OUTPUT).read_text(errors="replace").split("\n")
    except OSError:
        return "it left no output"
    return next(
        (line.strip() for line in reversed(lines) if line.strip()), "it printed nothing, as where cluster.setup fails"
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
