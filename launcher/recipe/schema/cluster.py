"""Section `cluster`: the machines a run asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem
from launcher.recipe.schema import kubernetes as _kubernetes
from launcher.recipe.schema import ray as _ray
from launcher.recipe.schema import restart as _restart
from launcher.recipe.schema import slurm as _slurm
from launcher.recipe.schema.kubernetes import Kubernetes
from launcher.recipe.schema.ray import Ray
from launcher.recipe.schema.restart import Restart
from launcher.recipe.schema.slurm import Slurm


@dataclass(kw_only=True, slots=True)
class Cluster:
    """The machines a run asks for.

    target: what `launcher submit` and `launcher render` use unless --target says otherwise
    nodes: machines
    min_nodes: with so many a run goes on when others are lost, and takes them in again when they come back; null: all
    nproc_per_node: ranks on each machine, which is GPUs on each machine
    accelerator: auto takes the GPUs where there are any, else the CPU
    gpu_memory_gib: memory of one GPU in GiB; null: the plan is not checked against it
    time_limit_min: minutes after which the run checkpoints and stops as if preempted; null: none
    stop_lead_s: seconds before the time limit at which the run is asked to checkpoint and stop, and how long a
        preempted one has for it; null: a tenth of the limit, at most 300
    join_timeout_s: how long nodes wait for each other at the start of an attempt
    network_interface: by which the nodes of a job talk; null: the one that leads to node 0
    preflight: whether nodes and ranks are examined for some seconds before training starts
    snapshot: whether the job runs from a copy of the launcher's and the current repository's code
    hang_timeout_s: a run that stands still for so long is ended, the rank that hangs is named and the run goes on from
        its last checkpoint; starting, compiling, saving have half an hour at least; auto: ten times the slowest of the
        recent steps, at least 300; null: never
    straggler_factor: a rank that computes so many times as long as the median of all, or whose waiting for rows makes
        steps so many times as long, is named; null: never
    restart: how often the run is started again by itself
    slurm: what only target slurm reads
    ray: what only target ray reads
    kubernetes: what only target kubernetes reads
    env: names of environment variables a job needs (secrets: the name alone is ever written); each must be set
        when the set-up lines have run, which may export it
    setup: shell lines run before the job, as `module load cuda`; taken as they are, without interpolation
    """

    target: Literal["torchrun", "accelerate", "slurm", "ray", "kubernetes"] = "torchrun"
    nodes: int = 1
    min_nodes: int | None = None
    nproc_per_node: int = 1
    accelerator: Literal["auto", "cuda", "cpu"] = "auto"
    gpu_memory_gib: float | None = None
    time_limit_min: int | None = None
    stop_lead_s: int | None = None
    join_timeout_s: int = 3600
    network_interface: str | None = None
    preflight: bool = True
    snapshot: bool = False
    hang_timeout_s: int | Literal["auto"] | None = "auto"
    straggler_factor: float | None = 1.5
    env: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    restart: Restart = field(default_factory=Restart)
    slurm: Slurm = field(default_factory=Slurm)
    ray: Ray = field(default_factory=Ray)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)


def check(cluster: Cluster) -> Iterator[Problem]:
    """Rules of this section alone."""
    for key, unit in (("nodes", "node"), ("nproc_per_node", "rank a node")):
        if getattr(cluster, key) < 1:
            yield Problem(f"cluster.{key}", getattr(cluster, key), f"1 {unit} or more")
    if cluster.min_nodes is not None and not 1 <= cluster.min_nodes <= cluster.nodes:
        expected = f"1 to the {cluster.nodes} of cluster.nodes, or null"
        yield Problem("cluster.min_nodes", cluster.min_nodes, expected, because=("cluster.nodes",))
    if isinstance(cluster.hang_timeout_s, int) and cluster.hang_timeout_s < 1:
        yield Problem("cluster.hang_timeout_s", cluster.hang_timeout_s, "1 second or more, auto, or null")
    if cluster.straggler_factor is not None and cluster.straggler_factor <= 1:
        yield Problem("cluster.straggler_factor", cluster.straggler_factor, "a number above 1, or null")
    if cluster.time_limit_min is not None and cluster.time_limit_min < 1:
        yield Problem("cluster.time_limit_min", cluster.time_limit_min, "1 minute or more, or null")
    if cluster.stop_lead_s is not None and not 1 <= cluster.stop_lead_s <= 65535:
        yield Problem("cluster.stop_lead_s", cluster.stop_lead_s, "1 to 65535 seconds, or null")
    if cluster.join_timeout_s < 1:
        yield Problem("cluster.join_timeout_s", cluster.join_timeout_s, "1 second or more")
    interface = cluster.network_interface
    if interface is not None and not re.fullmatch(r"[^\s/:,^=]{1,15}", interface):
        yield Problem("cluster.network_interface", interface, "the name of one interface, as eth0 or ib0, or null")
    if cluster.gpu_memory_gib is not None and cluster.gpu_memory_gib <= 0:
        yield Problem("cluster.gpu_memory_gib", cluster.gpu_memory_gib, "GiB above 0, or null")
    for name in cluster.env:
        if not name.isidentifier():
            safe = name.partition("=")[0] + ("=..." if "=" in name else "")
            fix = "Export the value in the shell and write the name alone."
            yield Problem("cluster.env", safe, "the name of a variable, never its value", fix)
    yield from _restart.check(cluster.restart)
    yield from _slurm.check(cluster.slurm)
    yield from _ray.check(cluster.ray)
    yield from _kubernetes.check(cluster.kubernetes)
