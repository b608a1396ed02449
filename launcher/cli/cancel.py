"""`launcher cancel`: ends a run for good, with a checkpoint where there is time for one."""

from __future__ import annotations

import getpass
import socket

import click

from launcher.cli._common import find_submitted
from launcher.errors import UserError


@click.command(short_help="Stop a run for good, submitted or in a terminal.")
@click.argument("run")
def command(run: str) -> None:
    """Stop a run for good: its job is taken out of the queue, or asked for a checkpoint and the end.

    RUN is a path, or a name below runs/. What was learnt stays; `launcher submit RUN` or `launcher resume RUN` goes on.
    Slurm's jobs are waited for while they save, at most cluster.stop_lead_s; other targets' are not.

    example: launcher cancel runs/big
    """
    from launcher.jobs import targets
    from launcher.jobs.asking import ask_one
    from launcher.jobs.job import OVER
    from launcher.jobs.submissions import latest
    from launcher.run.control import CANCEL, request_stop
    from launcher.run.lease import current_owner
    from launcher.run.state import read_state

    directory, place = find_submitted(run)
    job = latest(place)
    status = ask_one(job) if job else None
    active = status is not None and status.state not in OVER
    owner, alive = current_owner(directory)
    driven = alive is not False  # somebody holds the lease, or may hold it on a host that is not seen from here
    if not active and not driven:
        said = f"{job.target} job {job.id} is {status.state}" if job and status else "nothing was submitted"
        raise UserError(f"{directory.path} is {read_state(directory).status} ({said}): there is nothing to cancel.")
    if directory.exists():
        request_stop(directory, f"{CANCEL} by {getpass.getuser()}@{socket.gethostname()}")
    if job is not None and status is not None and active:
        targets.find(job.target).cancel(job)
        click.echo(f"{job.target} job {job.id}, {status.state}: asked to end; it does not come back")
    if driven and owner is not None:
        click.echo(f"{directory.path}: asked for a checkpoint and the end ({owner})")
