"""Keys `cluster.slurm`: what a batch job asks of Slurm beside nodes, ranks and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Container:
    """The container that a node's part of a Slurm job runs in.

    runtime: pyxis (options of srun) or apptainer (a command behind srun); none runs on the node itself
    image: `registry#image:tag`, a .sqsh file or a .sif file; needed with a runtime
    mounts: SOURCE:TARGET or SOURCE:TARGET:ro, absolute paths; the run's directory is always mounted
    workdir: directory inside the container to start in; null: the image's
    """

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    workdir: str | None = None


@dataclass(kw_only=True, slots=True)
class Slurm:
    """What a batch job asks of Slurm.

    account: to be charged; null: the site's default, as for the next six
    partition: queue
    qos: quality of service
    constraint: features that nodes must have
    exclude: nodes not to be used
    reservation: to run in
    comment: kept with the job
    tasks: node starts one agent a node, which starts the ranks; gpu starts each rank as a task of srun
    cpus_per_node: cores that a node's ranks share; null: all of each node, with exclusive, else 4 a rank
    mem: memory of a node as sbatch takes it; 0 is all of it
    exclusive: whether nobody else's jobs share the nodes
    gres: generic resource that is asked for in place of --gpus-per-node, as gpu:a100:8; null: --gpus-per-node
    requeue: whether the job goes back into the queue after a preemption, the time limit or a lost node
    port: of the rendezvous on the first node; null: derived from the job id
    host_suffix: appended to the first node's name to reach it over the fast network, as `i` at some sites
    extra: further options of sbatch, as --mail-type=END; taken as they are
    container: what a node's part of the job runs in
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    comment: str | None = None
    tasks: Literal["node", "gpu"] = "node"
    cpus_per_node: int | None = None
    mem: str = "0"
    exclusive: bool = True
    gres: str | None = None
    requeue: bool = True
    port: int | None = None
    host_suffix: str = ""
    extra: list[str] = field(default_factory=list)
    container: Container = field(default_factory=Container)


def check(slurm: Slurm) -> Iterator[Problem]:
    """Rules of these keys alone."""
    if slurm.cpus_per_node is not None and slurm.cpus_per_node < 1:
        yield Problem("cluster.slurm.cpus_per_node", slurm.cpus_per_node, "1 core or more, or null")
    container = slurm.container
    if container.runtime != "none" and not container.image:
        yield Problem("cluster.slurm.container.image", container.image, "an image, since container.runtime is set")
