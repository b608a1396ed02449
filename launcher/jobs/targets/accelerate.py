"""Target `accelerate`: its configuration file, and one bash script a node that starts the ranks with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem
from launcher.jobs.job import Finding, Job
from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered
from launcher.jobs.targets import process
from launcher.jobs.targets.process import cancel, logs, status
from launcher.jobs.targets.script import command, rendezvous_conf, scripts

__all__ = ["cancel", "logs", "problems", "render", "status", "submit", "validate"]

FILE = "accelerate.yaml"


def problems(spec: JobSpec) -> Iterator[Problem]:
    """What of the recipe cannot be started so."""
    if spec.cluster.min_nodes is not None and spec.nodes > 1:
        expected = "null: accelerate launch starts a fixed number of machines"
        fix = "Start launcher run on each node by hand, or take target torchrun, slurm or ray."
        yield Problem("cluster.min_nodes", spec.cluster.min_nodes, expected, fix, because=("cluster.target",))


def render(spec: JobSpec) -> Rendered:
    """`accelerate.yaml`, for every node, and `job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each runs its own."""
    import yaml

    text = yaml.safe_dump(dict(spec.accelerate), sort_keys=False)
    return scripts(replace(spec, files={**spec.files, FILE: text}), starter="accelerate", start=_start)


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    """Whether bash reads the scripts, and accelerate is here."""
    return process.look(spec, rendered, package="accelerate")


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    """Start `job.sh` here in the background.

    Raises:
        UserError: it is a job of several nodes, or something that it needs is not here.
    """
    return process.start(spec, rendered, folder, target="accelerate")


def _start(spec: JobSpec, node: int) -> list[str]:
    options = [f"--config_file {FILE}"]
    if spec.nodes > 1:  # what differs from node to node, and what accelerate reads from the command line alone
        options += [
            f"--machine_rank {node}",
            f'--main_process_ip "${{{ENDPOINT}%:*}}"',
            f'--main_process_port "${{{ENDPOINT}##*:}}"',
            "--rdzv_backend c10d",
            f"--rdzv_conf {rendezvous_conf(spec, node)}",
        ]
    enter = 'cd "$here"  # accelerate looks for the files that its configuration names where it is started'
    return [enter, command("accelerate launch", *options, shlex.join(spec.argv))]
