"""Target `torchrun`: one bash script a node that starts the ranks with plain torchrun; needs no scheduler."""

from __future__ import annotations

import shlex

from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered, stop_after_s

JOIN_TIMEOUT_S = 3600  # other nodes wait for node 0, whose first act is to prepare the data


def render(spec: JobSpec) -> Rendered:
    """`job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each node runs its own."""
    names = ["job.sh"] if spec.nodes == 1 else [f"node-{i}.sh" for i in range(spec.nodes)]
    scripts = {name: _script(spec, node) for node, name in enumerate(names)}
    if spec.nodes == 1:
        command = "bash job.sh"
    else:
        lines = (f"on node {node}: {ENDPOINT}=HOST:PORT bash {name}" for node, name in enumerate(names))
        command = "\n".join(lines) + "\n(HOST:PORT: an address of node 0 that all nodes reach, and a free port there)"
    return Rendered({**spec.files, **scripts}, command)


def _script(spec: JobSpec, node: int) -> str:
    endpoint = f' "${ENDPOINT}"' if spec.nodes > 1 else ""
    where = f"node {node} of {spec.nodes}, " if spec.nodes > 1 else ""
    unset = "cluster.setup has run and left it unset" if spec.setup else "it is not set here"
    lines = [
        "#!/usr/bin/env bash",
        f"# Run {spec.name}: {where}{spec.nproc_per_node} ranks started by torchrun.",
        "set -euo pipefail",
        'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
        *spec.setup,
        *(f': "${{{name}:?cluster.env names it, but {unset}}}"' for name in spec.env_names),
        *(_rendezvous() if spec.nodes > 1 else ()),
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())),
        *_threads(spec.nproc_per_node),
    ]
    if node == 0:
        lines += [
            "# Node 0's first act: the run directory and the data" + (", once the port is free." if endpoint else "."),
            f'python -m launcher.jobs.begin "$here/recipe.yaml"{endpoint}',
        ]
    if node == 0 and spec.time_limit_min is not None:
        lines += _time_limit(spec)
    return "\n".join([*lines, _torchrun(spec, node)]) + "\n"


def _threads(ranks: int) -> list[str]:
    """Threads of each rank: this node's cores shared evenly; torchrun alone would set 1."""
    share = f"$(( $(nproc) > {ranks} ? $(nproc) / {ranks} : 1 ))"
    return [f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{share}}}"']


def _rendezvous() -> list[str]:
    return [f': "${{{ENDPOINT}:?set it to HOST:PORT of node 0}}"']


def _time_limit(spec: JobSpec) -> list[str]:
    """A timer that asks for checkpoint-and-stop shortly before the limit, and ends with torchrun."""
    seconds = stop_after_s(spec.time_limit_min or 0)
    request = shlex.quote(f"{spec.argv[-1]}/control/stop-request")
    wait = f"for ((s = 0; s < {seconds}; s++)); do sleep 1; kill -0 $$ 2>/dev/null || exit; done"
    return [f"( {wait}; echo 'time limit' > {request} ) &"]


def _torchrun(spec: JobSpec, node: int) -> str:
    if spec.nodes == 1:
        options = ["--standalone", f"--nproc-per-node={spec.nproc_per_node}", "--max-restarts=0"]
    else:
        timeouts = f"join_timeout={JOIN_TIMEOUT_S},read_timeout={JOIN_TIMEOUT_S}"
        options = [
            f"--nnodes={spec.nodes}",
            f"--nproc-per-node={spec.nproc_per_node}",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            f'--rdzv-endpoint="${ENDPOINT}"',
            f"--rdzv-id={shlex.quote(spec.name)}",
            f"--rdzv-conf=is_host={int(node == 0)},{timeouts}",  # explicit: torchrun guesses the host by its name
        ]
    return " \\\n  ".join([f"exec torchrun {options[0]}", *options[1:], shlex.join(spec.argv)])
