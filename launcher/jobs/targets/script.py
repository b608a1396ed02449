"""What the bash scripts of `torchrun` and `accelerate` share: one a node; node 0 prepares the data, all start ranks."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered

JOIN_TIMEOUT_S = 3600  # other nodes wait for node 0, whose first act is to prepare the data


def scripts(spec: JobSpec, *, starter: str, start: Callable[[JobSpec, int], list[str]]) -> Rendered:
    """`job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each node runs its own.

    starter: who starts the ranks, for the reader
    start: the last lines of a node's script
    """
    names = ["job.sh"] if spec.nodes == 1 else [f"node-{i}.sh" for i in range(spec.nodes)]
    texts = {name: _script(spec, node, starter, start(spec, node)) for node, name in enumerate(names)}
    if spec.nodes == 1:
        command = "bash job.sh"
    else:
        lines = (f"on node {node}: {ENDPOINT}=HOST:PORT bash {name}" for node, name in enumerate(names))
        command = "\n".join(lines) + "\n(HOST:PORT: an address of node 0 that all nodes reach, and a free port there)"
    return Rendered({**spec.files, **texts}, command)


def rendezvous_conf(node: int) -> str:
    """Explicit, since torchrun guesses by its name which host is node 0."""
    return f"is_host={int(node == 0)},join_timeout={JOIN_TIMEOUT_S},read_timeout={JOIN_TIMEOUT_S}"


def command(*words: str) -> str:
    """One command over several lines, a word or option on each."""
    return " \\\n  ".join(words)


def _script(spec: JobSpec, node: int, starter: str, start: list[str]) -> str:
    endpoint = f' "${ENDPOINT}"' if spec.nodes > 1 else ""
    where = f"node {node} of {spec.nodes}, " if spec.nodes > 1 else ""
    unset = "cluster.setup has run and left it unset" if spec.setup else "it is not set here"
    lines = [
        "#!/usr/bin/env bash",
        f"# Run {spec.name}: {where}{spec.nproc_per_node} ranks started by {starter}.",
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
    return "\n".join([*lines, *start]) + "\n"


def _threads(ranks: int) -> list[str]:
    """Threads of each rank: this node's cores shared evenly; torchrun alone would set 1."""
    share = f"$(( $(nproc) > {ranks} ? $(nproc) / {ranks} : 1 ))"
    return [f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{share}}}"']


def _rendezvous() -> list[str]:
    return [f': "${{{ENDPOINT}:?set it to HOST:PORT of node 0}}"']


def _time_limit(spec: JobSpec) -> list[str]:
    """A timer that asks for checkpoint-and-stop shortly before the limit, and ends with the ranks."""
    seconds = max(1, (spec.time_limit_min or 0) * 60 - spec.stop_lead_s)
    request = shlex.quote(f"{spec.argv[-1]}/control/stop-request")
    wait = f"for ((s = 0; s < {seconds}; s++)); do sleep 1; kill -0 $$ 2>/dev/null || exit; done"
    return [f"( {wait}; echo 'time limit' > {request} ) &"]
