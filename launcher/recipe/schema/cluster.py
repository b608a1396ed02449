"""Section `cluster`: the machines a run asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Cluster:
    """The machines a run asks for.

    nodes: machines
    nproc_per_node: ranks on each machine, which is GPUs on each machine
    accelerator: auto takes the GPUs where there are any, else the CPU
    gpu_memory_gib: memory of one GPU in GiB; null: the plan is not checked against it
    time_limit_min: minutes after which the run checkpoints and stops as if preempted; null: none
    env: names of environment variables a job needs (secrets: the name alone is ever written); each must be set
        when the set-up lines have run, which may export it
    setup: shell lines run before the job, as `module load cuda`; taken as they are, without interpolation
    """

    nodes: int = 1
    nproc_per_node: int = 1
    accelerator: Literal["auto", "cuda", "cpu"] = "auto"
    gpu_memory_gib: float | None = None
    time_limit_min: int | None = None
    env: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)


def check(cluster: Cluster) -> Iterator[Problem]:
    """Rules of this section alone."""
    for key, unit in (("nodes", "node"), ("nproc_per_node", "rank a node")):
        if getattr(cluster, key) < 1:
            yield Problem(f"cluster.{key}", getattr(cluster, key), f"1 {unit} or more")
    if cluster.time_limit_min is not None and cluster.time_limit_min < 1:
        yield Problem("cluster.time_limit_min", cluster.time_limit_min, "1 minute or more, or null")
    if cluster.gpu_memory_gib is not None and cluster.gpu_memory_gib <= 0:
        yield Problem("cluster.gpu_memory_gib", cluster.gpu_memory_gib, "GiB above 0, or null")
    for name in cluster.env:
        if not name.isidentifier():
            safe = name.partition("=")[0] + ("=..." if "=" in name else "")
            fix = "Export the value in the shell and write the name alone."
            yield Problem("cluster.env", safe, "the name of a variable, never its value", fix)
