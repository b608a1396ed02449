"""Keys `cluster.slurm`: what a batch job asks of Slurm beside nodes, ranks and time."""

from __future__ import annotations

import re
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
    setup: shell lines run on the first node outside of the container, as `module load apptainer`; those of
        cluster.setup are run inside
    """

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    workdir: str | None = None
    setup: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Slurm:
    """What a batch job asks of Slurm.

    account: to be charged; null: the site's default, as for the next six
    partition: queue that the job waits in
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
    sweep_parallel: how many runs of a sweep are in work at once; null: as many as Slurm grants
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
    sweep_parallel: int | None = None
    extra: list[str] = field(default_factory=list)
    container: Container = field(default_factory=Container)


_MEM = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_GRES = re.compile(r"[A-Za-z][\w-]*(:[A-Za-z][\w.-]*)?(:\d+)?")
_UNSAFE = re.compile(r"[\n\r\\'\"`$]")  # would end the line or its quotes, or look as if Slurm expanded it
_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(=.*)?")

# Options of sbatch that keys decide, and what to write instead; as sbatch does, an unambiguous beginning is known too.
OWNED = {
    "account": "cluster.slurm.account",
    "array": "launcher submit --sweep",
    "chdir": "",
    "comment": "cluster.slurm.comment",
    "constraint": "cluster.slurm.constraint",
    "cpus-per-gpu": "cluster.slurm.cpus_per_node",
    "cpus-per-task": "cluster.slurm.cpus_per_node",
    "error": "",
    "exclude": "cluster.slurm.exclude",
    "exclusive": "cluster.slurm.exclusive",
    "export": "cluster.env",
    "export-file": "cluster.env",
    "gpu-bind": "",
    "gpus": "cluster.nproc_per_node",
    "gpus-per-node": "cluster.nproc_per_node",
    "gpus-per-socket": "cluster.nproc_per_node",
    "gpus-per-task": "cluster.nproc_per_node",
    "gres": "cluster.slurm.gres",
    "job-name": "run.name",
    "mem": "cluster.slurm.mem",
    "mem-per-cpu": "cluster.slurm.mem",
    "mem-per-gpu": "cluster.slurm.mem",
    "no-requeue": "cluster.slurm.requeue",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.slurm.tasks",
    "ntasks-per-core": "cluster.slurm.tasks",
    "ntasks-per-gpu": "cluster.slurm.tasks",
    "ntasks-per-node": "cluster.slurm.tasks",
    "ntasks-per-socket": "cluster.slurm.tasks",
    "open-mode": "",
    "output": "",
    "oversubscribe": "cluster.slurm.exclusive",
    "parsable": "",
    "partition": "cluster.slurm.partition",
    "qos": "cluster.slurm.qos",
    "requeue": "cluster.slurm.requeue",
    "reservation": "cluster.slurm.reservation",
    "signal": "cluster.stop_lead_s",
    "test-only": "launcher render",
    "time": "cluster.time_limit_min",
    "wait": "",
    "wrap": "",
}


def check(slurm: Slurm) -> Iterator[Problem]:
    """Rules of these keys alone."""
    for key in ("account", "partition", "qos", "constraint", "exclude", "reservation", "comment"):
        value = getattr(slurm, key)
        if value is not None and (not value.strip() or _UNSAFE.search(value)):
            fix = "Slurm expands no variables there." if "$" in value else ""
            yield Problem(
                f"cluster.slurm.{key}", value, "text without quotes, backslashes, $ and line ends, or null", fix
            )
    for key in ("cpus_per_node", "sweep_parallel"):
        value = getattr(slurm, key)
        if value is not None and value < 1:
            yield Problem(f"cluster.slurm.{key}", value, "1 or more, or null")
    if not _MEM.fullmatch(slurm.mem):
        yield Problem("cluster.slurm.mem", slurm.mem, "a number with K, M, G or T, as 200G, or 0 for all of a node")
    if slurm.gres is not None and not all(map(_GRES.fullmatch, slurm.gres.split(","))):
        yield Problem("cluster.slurm.gres", slurm.gres, "NAME:COUNT or NAME:TYPE:COUNT, as gpu:a100:8, or null")
    if slurm.port is not None and not 1024 <= slurm.port <= 65535:
        yield Problem("cluster.slurm.port", slurm.port, "1024 to 65535, or null for one from the job id")
    if slurm.host_suffix and not re.fullmatch(r"[\w.-]+", slurm.host_suffix, re.ASCII):
        yield Problem("cluster.slurm.host_suffix", slurm.host_suffix, "letters, digits, dots and hyphens, as i or -ib")
    yield from _extra(slurm.extra)
    yield from _container(slurm.container)


def owned(option: str) -> str | None:
    """The option of `OWNED` that sbatch would take this one for; None if it is none of them."""
    if option in OWNED:
        return option
    meant = [name for name in OWNED if name.startswith(option)]
    return meant[0] if len(option) > 2 and meant else None


def _extra(options: list[str]) -> Iterator[Problem]:
    for option in options:
        match = _OPTION.fullmatch(option)
        if match is None or _UNSAFE.search(option.replace('"', "")) or option.count('"') % 2:
            expected = "one option of sbatch, as --mail-type=END, without shell variables and line ends"
            yield Problem("cluster.slurm.extra", option, expected, "Write --name=value, in its long form.")
        elif (name := owned(match[1])) is not None:
            key = OWNED[name]
            fix = f"Use {key}." if key else "The job cannot work with another value."
            yield Problem("cluster.slurm.extra", option, f"an option that no key decides, and --{name} is not", fix)


def _container(container: Container) -> Iterator[Problem]:
    key = "cluster.slurm.container"
    if container.runtime != "none" and not container.image:
        yield Problem(f"{key}.image", container.image, "an image, since container.runtime is set")
    elif container.image is not None and (not container.image.strip() or _UNSAFE.search(container.image)):
        yield Problem(f"{key}.image", container.image, "a name or path without quotes, backslashes, $ and line ends")
    if container.runtime == "none":
        given = [name for name in ("image", "mounts", "workdir", "setup") if getattr(container, name)]
        if given:
            expected = f"pyxis or apptainer, since container.{given[0]} is set"
            yield Problem(f"{key}.runtime", container.runtime, expected, because=(f"{key}.{given[0]}",))
    for mount in container.mounts:
        parts = mount.split(":")
        absolute = all(part.startswith("/") for part in parts[:2])
        if not 2 <= len(parts) <= 3 or not absolute or "," in mount or _UNSAFE.search(mount):
            yield Problem(f"{key}.mounts", mount, "SOURCE:TARGET or SOURCE:TARGET:ro with absolute paths")
    if container.workdir is not None and not container.workdir.startswith("/"):
        yield Problem(f"{key}.workdir", container.workdir, "an absolute path inside the container, or null")
