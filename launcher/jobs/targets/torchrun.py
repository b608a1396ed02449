"""Target `torchrun`: one bash script a node that starts the ranks with plain torchrun; needs no scheduler."""

from __future__ import annotations

import shlex

from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered
from launcher.jobs.targets.script import command, rendezvous_conf, scripts


def render(spec: JobSpec) -> Rendered:
    """`job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each node runs its own."""
    return scripts(spec, starter="torchrun", start=_start)


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
            f"--rdzv-conf={rendezvous_conf(node)}",
        ]
    return [command(f"exec torchrun {options[0]}", *options[1:], shlex.join(spec.argv))]
