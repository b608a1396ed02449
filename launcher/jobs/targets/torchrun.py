"""Target `torchrun`: one bash script a node that starts the ranks with plain torchrun; needs no scheduler."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import Problem
from launcher.jobs.job import Finding, Job
from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered
from launcher.jobs.targets import process
from launcher.jobs.targets.process import cancel, logs, status
from launcher.jobs.targets.script import command, rendezvous_conf, scripts, workers

__all__ = ["cancel", "logs", "problems", "render", "status", "submit", "validate"]


def problems(spec: JobSpec) -> Iterator[Problem]:
    """Every recipe can be started so."""
    yield from ()


def render(spec: JobSpec) -> Rendered:
    """`job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each node runs its own.

    The nodes of an elastic job start `launcher worker`: plain torchrun knows no run that goes on with fewer.
    """
    if spec.nodes > 1 and spec.cluster.min_nodes is not None:
        return workers(spec)
    return scripts(spec, starter="torchrun", start=_start)


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    """Whether bash reads the scripts, and torchrun is here."""
    return process.look(spec, rendered, package="torch")


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    """Start `job.sh` here in the background.

    Raises:
        UserError: it is a job of several nodes, or something that it needs is not here.
    """
    return process.start(spec, rendered, folder, target="torchrun")


def _start(spec: JobSpec, node: int) -> list[str]:
    if spec.nodes == 1:
        options = ["--standalone", f"--nproc-per-node={spec.nproc_per_node}", "--max-restarts=0"]
    else:
        options = [
            f"--nnodes={spec.nodes}",
            f"--nproc-per-node={spec.nproc_per_node}",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            f'--rdzv-endpoint="${ENDPOINT}"',
            f"--rdzv-id={shlex.quote(spec.name)}",
            f"--rdzv-conf={rendezvous_conf(spec, node)}",
        ]
    return [command(f"torchrun {options[0]}", *options[1:], shlex.join(spec.argv))]
