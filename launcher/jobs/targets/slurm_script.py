"""The text of a Slurm batch script: what it asks for, how it starts the run, and when it goes back into the queue.

All that depends on the cluster is found when the script runs; an #SBATCH line holds plain values only, since Slurm
expands nothing there. One script serves one run, or the runs of a sweep as an array job.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from launcher.jobs.spec import JobSpec

FILE = "job.sbatch"
PORTS = "10000 + (SLURM_JOB_ID + 1009 * try) % 20000"  # below 32768, where the ports that the kernel hands out begin
_LAUNCHER_VARIABLES = ("LAUNCHER_TARGET", "LAUNCHER_JOB_ID", "LAUNCHER_JOB_RESTART")


def script(specs: Sequence[JobSpec], *, name: str) -> str:
    """The batch script `name` of one run, or of several that differ in name and recipe alone."""
    spec, array = specs[0], len(specs) > 1
    parts = [
        ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(spec, name, len(specs)))],
        _about(specs),
        environment(spec),
        _run(specs),
        *([_rendezvous(spec)] if spec.nodes > 1 or spec.cluster.slurm.tasks == "gpu" else ()),
        _cores(spec),
        _stop(),
        _start(spec),
        _wait(),
        _end(spec, array),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def share_of_node(spec: JobSpec) -> Iterator[str]:
    """How much of a node a job has beside its cores and GPUs, and for how long."""
    slurm = spec.cluster.slurm
    if slurm.exclusive:
        yield "--exclusive"
    yield f"--mem={slurm.mem}"
    if spec.time_limit_min is not None:
        yield f"--time={spec.time_limit_min}"


def cores_of_a_node(spec: JobSpec) -> int | None:
    """Cores that are asked for on each node; None: all that it has."""
    slurm = spec.cluster.slurm
    if slurm.cpus_per_node is not None or slurm.exclusive:
        return slurm.cpus_per_node
    return 4 * spec.nproc_per_node


def uses_gpus(spec: JobSpec) -> bool:
    """Whether GPUs are asked for: unless the recipe is for the CPU."""
    return spec.cluster.accelerator != "cpu"


def output_name(*, array: bool) -> str:
    """The file of the job's own output, in the folder it is submitted from."""
    return "slurm-%A_%a.out" if array else "slurm-%j.out"


def queue_options(spec: JobSpec, name: str) -> Iterator[str]:
    """What says in whose name a job waits, and for which part of the cluster."""
    yield f"--job-name={shlex.quote(name)}"
    for key in ("account", "partition", "qos", "constraint", "exclude", "reservation", "comment"):
        if (value := getattr(spec.cluster.slurm, key)) is not None:
            yield f"--{key}={shlex.quote(value)}"


def environment(spec: JobSpec) -> list[str]:
    """Set-up lines and variables; in a container the worker runs the set-up lines, inside."""
    slurm = spec.cluster.slurm
    contained = slurm.container.runtime != "none"
    setup = slurm.container.setup if contained else spec.setup
    lines = ["set -euo pipefail"]
    if setup:
        lines = ["# Others' set-up lines may read variables that are not set, so -u comes behind them."]
        lines += ["set -eo pipefail", *setup, "set -u"]
    if spec.env_names and not contained:
        why = "cluster.setup has run and left it unset" if spec.setup else "it is not set where sbatch was called"
        lines += [f': "${{{name}:?cluster.env names it, but {why}}}"' for name in spec.env_names]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())]
    lines += spec.code_lines
    return lines


def require_launcher() -> list[str]:
    """Lines that end a script where the command is not found."""
    return [
        "if ! command -v launcher >/dev/null; then",
        '  echo "launcher: not found on $(hostname); activate its environment in cluster.setup" >&2',
        "  exit 127",
        "fi",
    ]


def _options(spec: JobSpec, name: str, runs: int) -> Iterator[str]:
    slurm, tasks = spec.cluster.slurm, _tasks_per_node(spec)
    yield from queue_options(spec, name)
    if runs > 1:
        limit = f"%{slurm.sweep_parallel}" if slurm.sweep_parallel else ""
        yield f"--array=0-{runs - 1}{limit}"
    if (least := spec.cluster.min_nodes) is None:
        yield f"--nodes={spec.nodes}"
        yield f"--ntasks-per-node={tasks}"
    else:  # a number of tasks would be that of the fewest nodes, and Slurm would give no more than those need (22.05)
        yield f"--nodes={least}-{spec.nodes}"
        tasks = 1
    if slurm.gres is not None:
        yield f"--gres={slurm.gres}"
    elif uses_gpus(spec):
        yield f"--gpus-per-node={spec.nproc_per_node}"
    if cores := cores_of_a_node(spec):
        yield f"--cpus-per-task={cores // tasks}"
    yield from share_of_node(spec)
    yield f"--signal=B:USR1@{spec.stop_lead_s}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield f"--output={output_name(array=runs > 1)}"
    yield from slurm.extra


def _about(specs: Sequence[JobSpec]) -> list[str]:
    spec = specs[0]
    how = "one agent a node starts them" if spec.cluster.slurm.tasks == "node" else "each is a task of srun"
    what = f"Run {spec.name}" if len(specs) == 1 else f"A sweep of {len(specs)} runs, each on"
    least = "" if spec.cluster.min_nodes is None else f"{spec.cluster.min_nodes} to "
    size = f"{least}{_count(spec.nodes, 'node')} x {_count(spec.nproc_per_node, 'rank')}; {how}."
    folder = "recipe.yaml" if len(specs) == 1 else "the recipes"
    return [
        f"# {what}{':' if len(specs) == 1 else ''} {size}",
        f"# Submit it from the folder that holds {folder}: sbatch {FILE}",
        "# Look: squeue, launcher status RUN.  End it: launcher cancel RUN, or scancel.",
    ]


def _run(specs: Sequence[JobSpec]) -> list[str]:
    if len(specs) == 1:
        lines = [
            "# The run's directory, which all nodes share, and the recipe that the job's first start gives it.",
            f"run={shlex.quote(specs[0].run)}",
            "recipe=$SLURM_SUBMIT_DIR/recipe.yaml",
            "job=$SLURM_JOB_ID",
        ]
    else:
        lines = [
            "# The runs' directories, which all nodes share, and the recipe that a job's first start gives its run.",
            "runs=(",
            *(f"  {shlex.quote(spec.run)}" for spec in specs),
            ")",
            "run=${runs[SLURM_ARRAY_TASK_ID]}",
            "recipe=$SLURM_SUBMIT_DIR/recipe-$SLURM_ARRAY_TASK_ID.yaml",
            "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID may name the whole array",
        ]
    lines += [
        "if [[ ! -r $recipe ]]; then",
        '  echo "$recipe: not there; call sbatch in the folder that holds it" >&2',
        "  exit 2",
        "fi",
        "unset LAUNCHER_ATTEMPT LAUNCHER_NODES LAUNCHER_NODE_RANK LAUNCHER_RENDEZVOUS",
        'export LAUNCHER_TARGET=slurm LAUNCHER_JOB_ID=$job LAUNCHER_JOB_RESTART="${SLURM_RESTART_COUNT:-0}"',
    ]
    container = specs[0].cluster.slurm.container
    if container.runtime == "none":
        lines += require_launcher()
    lines += ['mkdir -p "$run/control"', 'rm -f "$run/control/verdict"  # an earlier start\'s last word']
    return lines


def _rendezvous(spec: JobSpec) -> list[str]:
    slurm = spec.cluster.slurm
    lines = ["# The nodes meet on the first one, which is this one."]
    if spec.nodes == 1:
        lines = ["# The ranks meet here.", "host=127.0.0.1"]
    else:
        lines += [
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            f"host=${{hosts%%$'\\n'*}}{shlex.quote(slurm.host_suffix) if slurm.host_suffix else ''}",
        ]
    if slurm.container.runtime != "none":
        lines += [
            "# A container may not know the names of nodes: its address, unless that is this node's to itself.",
            "address=$(getent ahostsv4 \"$host\" | sed -n '1s/ .*//p') || address=''",
            "if [[ -n $address && $address != 127.* ]]; then host=$address; fi",
        ]
    if slurm.port is not None:
        return [*lines, f"port={slurm.port}"]
    return [
        *lines,
        "for try in 0 1 2 3 4 5 6 7 8 9; do",
        f"  port=$(({PORTS}))  # below the ports that the kernel hands out",
        '  (: <"/dev/tcp/$host/$port") 2>/dev/null || break  # nobody answers: it is free',
        "done",
    ]


def _cores(spec: JobSpec) -> list[str]:
    tasks = _tasks_per_node(spec)
    lines = ["# Told to srun: some versions of it (22.05 to 23.02) give a task one core unless they are told."]
    if cores := cores_of_a_node(spec):
        lines += [f"cores={cores // tasks}"]
    else:
        share = "" if tasks == 1 else f"cores=$((cores > {tasks} ? cores / {tasks} : 1))"
        lines += [
            "# Of nodes that differ, those of the smallest; SLURM_JOB_CPUS_PER_NODE reads 64(x3),32.",
            "cores=$(tr , '\\n' <<<\"$SLURM_JOB_CPUS_PER_NODE\" | sed 's/(.*//' | sort -n | sed -n 1p)",
            *([share] if share else ()),
        ]
    return lines


def _stop() -> list[str]:
    return [
        "# USR1 comes before the time limit; TERM at the limit, at a preemption and from scancel.  Whatever comes, the",
        "# run is asked to write a checkpoint and stop, by a file, since signals do not reach ranks everywhere.",
        "reason=''",
        "trap 'reason=\"SIGUSR1 of Slurm\"' USR1",
        "trap 'reason=\"SIGTERM of Slurm\"' TERM",
        "ask_to_stop() {",
        "  local request=$run/control/stop-request",
        "  if [[ ! -e $request ]]; then",
        "    local new=$request.$SLURM_JOB_ID",
        '    if ! printf \'{"reason": "%s", "time": %s}\\n\' "$reason" "$(date +%s)" >"$new" ||',
        '      ! mv -f "$new" "$request"; then',
        '      touch "$request"  # a full disk; an empty request will do',
        "    fi",
        "  fi",
        "}",
    ]


def _start(spec: JobSpec) -> list[str]:
    slurm, tasks = spec.cluster.slurm, _tasks_per_node(spec)
    nodes = (
        str(spec.nodes) if spec.cluster.min_nodes is None else '"$SLURM_JOB_NUM_NODES"'
    )  # what Slurm gave this start
    srun = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        '--cpus-per-task="$cores"',
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        "--export=ALL",
    ]
    worker = ['launcher worker "$run"', '--recipe "$recipe"', f"--nodes {nodes}"]
    if slurm.tasks == "gpu":
        each = (
            f"export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={tasks} "
            "GROUP_RANK=$SLURM_NODEID"
        )
        lines = [
            "# The worker stays here, on the first node: it prepares the data, keeps the ledger and judges the end.",
            "# Single quotes: these variables differ from task to task.",
            "export MASTER_ADDR=$host MASTER_PORT=$port",
            "# shellcheck disable=SC2016",
            f"each='{each}; exec python -m launcher.trainer \"$0\"'",
        ]
        words = [*worker, "--", *srun, 'bash -c "$each" "$run"']
    else:
        lines = ["# One task a node and nothing between it and srun, so that signals and exit codes are the worker's."]
        if spec.nodes > 1:
            srun.append("--label")
            worker.append('--rendezvous "$host:$port"')
        words = [*srun, *_container(spec), *worker]
    return [*lines, " \\\n  ".join(words) + " &", "step=$!"]


def _container(spec: JobSpec) -> list[str]:
    """The run's directory and the recipe's folder go by the same names inside."""
    container = spec.cluster.slurm.container
    if container.runtime == "none":
        return []
    own = ["$run:$run", "$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR"]
    mounts = ",".join([*own, *map(_double_quoted, container.mounts)])
    image = shlex.quote(container.image or "")
    if container.runtime == "pyxis":
        names = ",".join([*_LAUNCHER_VARIABLES, *sorted(spec.env), *spec.env_names])
        workdir = [f"--container-workdir={shlex.quote(container.workdir)}"] if container.workdir else []
        return [f"--container-image={image}", f'--container-mounts="{mounts}"', *workdir, f"--container-env={names}"]
    words = ["apptainer exec", f'--bind "{mounts}"']
    if uses_gpus(spec):
        words.append("--nv")
    if container.workdir:
        words.append(f"--pwd {shlex.quote(container.workdir)}")
    return [*words, image]


def _wait() -> list[str]:
    return [
        "# A trapped signal ends `wait` early.  The request is repeated until it is served, since a start of the run",
        "# takes older ones back.",
        'code=0; wait "$step" || code=$?',
        'if kill -0 "$step" 2>/dev/null; then',
        '  while kill -0 "$step" 2>/dev/null; do',
        "    if [[ -n $reason && ! -e $run/control/verdict ]]; then ask_to_stop || :; fi",
        "    sleep 1",
        "  done",
        '  code=0; wait "$step" || code=$?',
        "fi",
    ]


def _end(spec: JobSpec, array: bool) -> list[str]:
    slurm, budget = spec.cluster.slurm, spec.cluster.restart.node
    lines = [
        "# Start again?  The worker left one word; if it left none it died, unless it refused to begin.",
        'verdict=$(cat "$run/control/verdict" 2>/dev/null) || verdict=none',
        "silent=$run/control/silent-ends  # job and number of ends in a row that left no word",
    ]
    if not slurm.requeue:
        return [
            *lines[:2],
            "if [[ $verdict == requeue ]]; then",
            f'  echo "$job: can go on (cluster.slurm.requeue is false, so it does not by itself): sbatch {FILE}"',
            "  exit 75",
            "fi",
            'exit "$code"',
        ]
    return [
        *lines,
        "case $verdict-$code in",
        '  requeue-*) rm -f "$silent" ;;',
        '  stop-* | none-0 | none-2 | none-126 | none-127) rm -f "$silent"; exit "$code" ;;',
        "  *)",
        "    ends=1",
        '    if read -r of count 2>/dev/null <"$silent" && [[ $of == "$job" ]]; then ends=$((count + 1)); fi',
        '    echo "$job $ends" >"$silent"',
        f"    if ((ends > {budget})); then",
        f'      echo "$job: {budget + 1} ends in a row without a word (cluster.restart.node = {budget}): given up" >&2',
        '      exit "$code"',
        "    fi ;;",
        "esac",
        "# Only while the job runs or at its time limit: scancel is for good, and after a preemption or the loss of a",
        "# node Slurm itself starts the job again.",
        "state=''",
        "for _ in 1 2 3 4 5 6; do  # Slurm may be busy",
        '  state=$(squeue --noheader --jobs="$job" --format=%T-%r) && break',
        "  sleep 5",
        "done",
        "case $state in",
        "  RUNNING-* | *-TimeLimit) ;;",
        '  *) echo "$job: not started again by this script: ${state:-unknown to squeue}"; exit "$code" ;;',
        "esac",
        'echo "$job: goes back into the queue (verdict $verdict, exit code $code)"',
        'scontrol requeue "$job" || { echo "$job: not requeued; it goes on after: sbatch ' + FILE + '" >&2; exit 75; }',
    ]


def _tasks_per_node(spec: JobSpec) -> int:
    return spec.nproc_per_node if spec.cluster.slurm.tasks == "gpu" else 1


def _double_quoted(text: str) -> str:
    """As it stands between double quotes of bash."""
    return "".join(f"\\{c}" if c in '\\"$`' else c for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
