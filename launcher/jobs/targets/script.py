"""What the bash scripts of `torchrun` and `accelerate` share.

On one node `launcher worker` owns the run and starts the ranks by their command; on several, each node has a script of
its own: node 0 prepares the data, and the ranks keep the ledger themselves.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from launcher.errors import EXIT_PREEMPTED
from launcher.jobs.spec import ENDPOINT, JobSpec, Rendered

_HERE = 'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)'


def scripts(spec: JobSpec, *, starter: str, start: Callable[[JobSpec, int], list[str]]) -> Rendered:
    """`job.sh`, or `node-0.sh`, `node-1.sh`, ... of which each node runs its own.

    starter: who starts the ranks, for the reader
    start: the last lines of a node's script, of which the last is the command that starts its ranks
    """
    if spec.nodes == 1:
        return Rendered({**spec.files, "job.sh": _alone(spec, starter, start(spec, 0))}, "bash job.sh")
    return _a_node(spec, lambda node: _one_of_several(spec, node, starter, start(spec, node)))


def workers(spec: JobSpec) -> Rendered:
    """`node-0.sh`, `node-1.sh`, ... of which each node runs `launcher worker`, and may be started again alone."""
    return _a_node(spec, lambda node: _worker(spec, node))


def _a_node(spec: JobSpec, text: Callable[[int], str]) -> Rendered:
    names = [f"node-{i}.sh" for i in range(spec.nodes)]
    texts = {name: text(node) for node, name in enumerate(names)}
    lines = (f"on node {node}: {ENDPOINT}=HOST:PORT bash {name}" for node, name in enumerate(names))
    command = "\n".join(lines) + "\n(HOST:PORT: an address of node 0 that all nodes reach, and a free port there)"
    return Rendered({**spec.files, **texts}, command)


def rendezvous_conf(spec: JobSpec, node: int) -> str:
    """Explicit, since torchrun guesses by its name which host is node 0; node 0's first act is to prepare the data."""
    timeout_s = spec.cluster.join_timeout_s
    return f"is_host={int(node == 0)},join_timeout={timeout_s},read_timeout={timeout_s}"


def command(*words: str) -> str:
    """One command over several lines, a word or option on each."""
    return " \\\n  ".join(words)


def _alone(spec: JobSpec, starter: str, start: list[str]) -> str:
    """The whole protocol: a lease, classes, verdict; a failure that may pass is started again here."""
    *before, ranks = start
    worker = command(f'launcher worker {shlex.quote(spec.run)} --recipe "$here/recipe.yaml" --', ranks).replace(
        "\n", "\n  "
    )
    state = shlex.quote(f"{spec.run}/state.json")
    lines = [
        *_head(spec, f"{spec.nproc_per_node} ranks started by {starter}."),
        _HERE,
        f"export LAUNCHER_TARGET={starter}",
        'export LAUNCHER_JOB_ID="${LAUNCHER_JOB_ID:-$(date +%Y%m%d-%H%M%S)-$$}"',
        *before,
        "# A signal asks for a checkpoint and the end.",
        "worker='' stopped=''",
        "trap 'stopped=yes; [[ -z $worker ]] || kill -TERM \"$worker\" 2>/dev/null || true' TERM INT HUP USR1",
        "# The worker holds the run's lease, prepares the data, has the ranks started by the command behind --, and",
        f"# says how they ended; {EXIT_PREEMPTED} is: start me again. That is done here after a failure that may pass,",
        "# and left to a person after a stop.",
        "for (( restart = 0; ; restart++ )); do",
        f"  [[ -z $stopped ]] || exit {EXIT_PREEMPTED}",
        "  export LAUNCHER_JOB_RESTART=$restart",
        f"  {worker} &",
        "  worker=$!",
        '  while kill -0 "$worker" 2>/dev/null; do wait "$worker" || true; done  # a signal interrupts `wait`',
        '  code=0; wait "$worker" || code=$?',
        f'  [[ $code == {EXIT_PREEMPTED} && -z $stopped ]] || exit "$code"',
        f'  if grep -q \'"status": "preempted"\' {state}; then exit "$code"; fi',
        "done",
    ]
    return "\n".join(lines) + "\n"


def _one_of_several(spec: JobSpec, node: int, starter: str, start: list[str]) -> str:
    *before, ranks = start
    lines = _head(spec, f"node {node} of {spec.nodes}, {spec.nproc_per_node} ranks started by {starter}.")
    if node == 0 or before:
        lines.append(_HERE)
    if node == 0:
        lines += [
            "# Node 0's first act: the run directory and the data, once the port is free.",
            f'python -m launcher.jobs.begin "$here/recipe.yaml" "${ENDPOINT}"',
        ]
    if node == 0 and spec.time_limit_min is not None:
        lines += _time_limit(spec)
    return "\n".join([*lines, *before, f"exec {ranks}"]) + "\n"


def _worker(spec: JobSpec, node: int) -> str:
    least = spec.cluster.min_nodes
    lines = _head(spec, f"node {node} of {spec.nodes}, of which {least} suffice; started again, it is taken in again.")
    options = [f"--nodes {spec.nodes}", f"--node-rank {node}", f'--rendezvous "${ENDPOINT}"']
    worker = command(f"exec launcher worker {shlex.quote(spec.run)}", '--recipe "$here/recipe.yaml"', *options)
    return "\n".join([*lines, _HERE, worker]) + "\n"


def _head(spec: JobSpec, what: str) -> list[str]:
    """The script's first lines: set-up, and the environment of the ranks."""
    unset = "cluster.setup has run and left it unset" if spec.setup else "it is not set here"
    return [
        "#!/usr/bin/env bash",
        f"# Run {spec.name}: {what}",
        *_setup(spec),
        *(f': "${{{name}:?cluster.env names it, but {unset}}}"' for name in spec.env_names),
        *(_rendezvous() if spec.nodes > 1 else ()),
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())),
        *spec.code_lines,
        *_threads(spec.nproc_per_node),
    ]


def _setup(spec: JobSpec) -> list[str]:
    if not spec.setup:
        return ["set -euo pipefail"]
    return ["set -eo pipefail", *spec.setup, "set -u  # behind set-up lines, which may read what is not set"]


def _threads(ranks: int) -> list[str]:
    """Threads of each rank: this node's cores shared evenly; torchrun alone would set 1."""
    share = f"$(( $(nproc) > {ranks} ? $(nproc) / {ranks} : 1 ))"
    return [f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{share}}}"']


def _rendezvous() -> list[str]:
    return [f': "${{{ENDPOINT}:?set it to HOST:PORT of node 0}}"']


def _time_limit(spec: JobSpec) -> list[str]:
    """A timer that asks for checkpoint-and-stop shortly before the limit, and ends with the ranks."""
    seconds = max(1, (spec.time_limit_min or 0) * 60 - spec.stop_lead_s)
    request = shlex.quote(f"{spec.run}/control/stop-request")
    wait = f"for ((s = 0; s < {seconds}; s++)); do sleep 1; kill -0 $$ 2>/dev/null || exit; done"
    return [f"( {wait}; echo 'time limit' > {request} ) &"]
