"""`prepare` on Slurm as text: an array of jobs that tokenise a share each, and one that packs when all have succeeded.

They ask for cores and no GPU. Finished shards are kept, so a job that is lost, or starts again, repeats little.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.jobs.spec import JobSpec, Rendered
from launcher.jobs.targets.slurm_script import (
    cores_of_a_node,
    environment,
    queue_options,
    require_launcher,
    share_of_node,
)

SHARDS, MERGE, SUBMIT = "shards.sbatch", "merge.sbatch", "submit.sh"
AFTER = ("--dependency=afterok:", "--kill-on-invalid-dep=yes")  # then the id of what has to succeed


def render(spec: JobSpec, *, shares: int, num_workers: int | None) -> Rendered:
    """`shards.sbatch`, `merge.sbatch`, and `submit.sh`, which submits both.

    num_workers: processes in each job; None: one for each core that Slurm gives it
    """
    workers = "" if num_workers else ' data.num_workers="${SLURM_CPUS_ON_NODE:-1}"'
    share = _script(
        spec, f"{spec.name}-shards", f"One of {shares} shares of the tokenising of {spec.name}.",
        f'launcher prepare recipe.yaml --shards "$SLURM_ARRAY_TASK_ID/{shares}"{workers}',
        [f"--array=0-{shares - 1}", "--output=shards-%A_%a.out"],
    )  # fmt: skip
    merge = _script(
        spec, f"{spec.name}-merge", f"Packs the data of {spec.name}, once all of it is tokenised.",
        f"launcher prepare recipe.yaml{workers}", ["--output=merge-%j.out"],
    )  # fmt: skip
    files = {**spec.files, SHARDS: share, MERGE: merge, SUBMIT: _submit_script(spec)}
    return Rendered(files, f"bash {SUBMIT}")


def _script(spec: JobSpec, name: str, about: str, command: str, options: list[str]) -> str:
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in [*queue_options(spec, name), *_options(spec), *options]),
        *(f"#SBATCH {option}" for option in spec.cluster.slurm.extra),
        "",
        f"# {about}",
        f"# Submit it from the folder that holds recipe.yaml, as {SUBMIT} does.",
        *environment(spec),
        *require_launcher(),
        f"exec {command}",
    ]
    return "\n".join(lines) + "\n"


def _options(spec: JobSpec) -> Iterator[str]:
    slurm = spec.cluster.slurm
    yield "--nodes=1"
    yield "--ntasks-per-node=1"
    if cores := cores_of_a_node(spec):
        yield f"--cpus-per-task={cores}"
    yield from share_of_node(spec)
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield "--open-mode=append"


def _submit_script(spec: JobSpec) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# Tokenises and packs the data of {spec.name}: an array of jobs, and one behind it.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f"shards=$(sbatch --parsable {SHARDS})",
        f'merge=$(sbatch --parsable {AFTER[0]}"${{shards%%;*}}" {AFTER[1]} {MERGE})',
        'echo "submitted shards $shards and merge $merge; look: squeue -j ${shards%%;*},${merge%%;*}"',
    ]
    return "\n".join(lines) + "\n"
