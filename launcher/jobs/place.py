"""Where this process stands in a job: how many nodes, which one this is, where they meet, and which job it is.

Options come first, then LAUNCHER_* variables, then what a scheduler has set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.errors import UserError
from launcher.run.lease import Submission

AUTO = "auto"
_LOOKED_FOR = (
    "LAUNCHER_NODES, LAUNCHER_NODE_RANK, LAUNCHER_RENDEZVOUS; SLURM_JOB_ID with SLURM_STEP_NODELIST (Slurm, inside "
    "srun); PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR (Kubeflow); JOB_COMPLETION_INDEX (a Kubernetes Indexed Job)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What is known of this process's place before any recipe is read; None: not known.

    rendezvous: HOST:PORT of node 0
    source: who said so, for people; empty: options
    names_may_come: whether node 0's name may not be known to the name service yet, as that of a starting pod
    """

    nodes: int | None = None
    rank: int | None = None
    rendezvous: str | None = None
    source: str = ""
    names_may_come: bool = False


def find_place(
    *,
    nodes: int | None,
    node_rank: int | None,
    rendezvous: str | None,
    command: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Place:
    """The place that options give, completed by LAUNCHER_* variables and by what a scheduler has set.

    rendezvous: HOST:PORT, `auto` or None, which asks the scheduler where there is one
    command: this process only watches over a command that starts every rank; it has no other nodes to meet

    Raises:
        UserError: `auto` and no scheduler's variables are here, or they tell of a start that cannot work.
    """
    environment = os.environ if environment is None else environment
    if nodes != 1:
        nodes = _number(environment, "LAUNCHER_NODES") if nodes is None else nodes
        node_rank = _number(environment, "LAUNCHER_NODE_RANK") if node_rank is None else node_rank
        rendezvous = rendezvous or environment.get("LAUNCHER_RENDEZVOUS") or None
    may_come = environment.get("LAUNCHER_TARGET") == "kubernetes" or "KUBERNETES_SERVICE_HOST" in environment
    given = Place(
        nodes=nodes, rank=node_rank, rendezvous=None if rendezvous == AUTO else rendezvous, names_may_come=may_come
    )
    if nodes is not None and nodes < 1:
        raise UserError(f"--nodes {nodes}: expected 1 or more.")
    if None not in (given.nodes, given.rank, given.rendezvous) or (nodes == 1 and rendezvous is None):
        return given
    scheduled = _slurm(environment, command=command) or _kubeflow(environment) or _indexed_job(environment)
    if scheduled is None:
        if rendezvous == AUTO:
            raise UserError(f"--rendezvous auto: no scheduler's variables are here. Looked for {_LOOKED_FOR}.")
        return given
    return replace(
        scheduled,
        nodes=given.nodes if given.nodes is not None else scheduled.nodes,
        rank=given.rank if given.rank is not None else scheduled.rank,
        rendezvous=given.rendezvous or scheduled.rendezvous,
        names_may_come=may_come,
    )


def settled(place: Place, nodes: int) -> tuple[int, str | None]:
    """Node rank and HOST:PORT of a place in a job of `nodes` nodes; (0, None) where it is alone.

    Raises:
        UserError: something is missing or out of range.
    """
    if nodes == 1 and not place.source:
        _require_alone(place)
    if nodes == 1 and place.rank is None:
        return 0, None
    if place.rank is None:
        raise UserError(
            f"--node-rank: missing in a job of {nodes} nodes: expected 0 to {nodes - 1}, another one on each node. "
            f"Looked for {_LOOKED_FOR}."
        )
    if not 0 <= place.rank < nodes:
        said = f" ({place.source})" if place.source else ""
        raise UserError(
            f"--node-rank {place.rank}{said}: expected 0 to {nodes - 1}, because this job has {nodes} "
            f"node{'s' * (nodes > 1)} (--nodes, cluster.nodes)."
        )
    if nodes == 1:
        return 0, None
    if place.rendezvous is None:
        raise UserError(
            f"--rendezvous: missing in a job of {nodes} nodes: expected HOST:PORT, an address of node 0 that "
            f"every node reaches and a free port there; or auto under a scheduler. Looked for {_LOOKED_FOR}."
        )
    return place.rank, place.rendezvous


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name) or None
    if text is not None and not text.isdecimal():
        raise UserError(f"{name} = {text}: expected a number.")
    return None if text is None else int(text)


def _require_alone(place: Place) -> None:
    """Raises UserError where a job of one node was given a place among several; `--nodes 1 --node-rank 0` is none."""
    given = [f"--node-rank {place.rank}"] if place.rank is not None and place.nodes is None else []
    given += [f"--rendezvous {place.rendezvous}"] if place.rendezvous is not None else []
    if given:
        count = "cluster.nodes = 1" if place.nodes is None else "--nodes 1"
        raise UserError(
            f"{' '.join(given)}: expected --nodes 2 or more, the same on every node, because this job has one node "
            f"({count}). To train on this machine alone leave {'it' if len(given) == 1 else 'both'} out."
        )


def find_submission(environment: Mapping[str, str] | None = None) -> Submission | None:
    """Which start of which job this is, from LAUNCHER_TARGET, LAUNCHER_JOB_ID, LAUNCHER_JOB_RESTART or Slurm's own.

    Raises:
        UserError: LAUNCHER_JOB_RESTART is no number.
    """
    environment = os.environ if environment is None else environment
    get = environment.get
    if job_id := get("LAUNCHER_JOB_ID"):
        restart = get("LAUNCHER_JOB_RESTART") or "0"
        if not restart.isdecimal():
            raise UserError(f"LAUNCHER_JOB_RESTART = {restart}: expected how often the job was started before, as 0.")
        return Submission(target=get("LAUNCHER_TARGET") or "torchrun", job_id=job_id, restart=int(restart))
    if job_id := get("SLURM_JOB_ID"):
        if (array := get("SLURM_ARRAY_JOB_ID")) and (task := get("SLURM_ARRAY_TASK_ID")):
            job_id = f"{array}_{task}"
        return Submission(target="slurm", job_id=job_id, restart=int(get("SLURM_RESTART_COUNT") or 0))
    return None


def start_reason(submission: Submission | None) -> str:
    """Why a worker's attempt starts, as the ledger tells people."""
    if submission is None:
        return "by hand"
    if submission.restart == 0:
        return "submitted"
    return "requeued" if submission.target == "slurm" else "restarted"


def first_host(nodelist: str) -> str:
    """The first name of a Slurm host list, as `gpu007` of `gpu[007-012,020],login1`; no program is asked."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", nodelist)  # up to a comma that is in no bracket
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def port_of(job_id: int) -> int:
    """A port below those that the kernel hands out, another one for each of 20,000 jobs in a row."""
    return 10000 + job_id % 20000


def _slurm(environment: Mapping[str, str], *, command: bool) -> Place | None:
    get = environment.get
    job = get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return None
    step = get("SLURM_STEP_NODELIST")
    count = (get("SLURM_STEP_NUM_NODES") if step else None) or get("SLURM_NNODES") or get("SLURM_JOB_NUM_NODES")
    nodes = int(count or 1)
    if command:
        return Place(nodes=nodes, rank=0, source=f"Slurm job {job}")
    if step is None:
        if nodes > 1:
            raise UserError(
                f"This is one process of Slurm job {job} on {nodes} nodes (SLURM_NNODES), outside of srun "
                "(no SLURM_STEP_NODELIST): expected one on each node. Use: srun --ntasks-per-node=1 launcher worker RUN"
            )
        return Place(nodes=1, rank=0, source=f"Slurm job {job}")
    tasks = int(get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS") or nodes)
    if tasks > nodes:
        raise UserError(
            f"srun started {tasks} tasks on {nodes} node{'s' * (nodes > 1)} (SLURM_STEP_NUM_TASKS): expected one a "
            "node, because each starts the ranks of its node. Use srun --ntasks-per-node=1 launcher worker RUN, or, "
            "for one task per GPU, launcher worker RUN -- srun ... python -m launcher.trainer RUN in the batch script."
        )
    rendezvous = f"{first_host(step)}:{port_of(int(job))}"
    return Place(nodes=nodes, rank=int(get("SLURM_NODEID") or 0), rendezvous=rendezvous, source=f"Slurm job {job}")


def _kubeflow(environment: Mapping[str, str]) -> Place | None:
    get = environment.get
    if not (address := get("PET_MASTER_ADDR")) or not get("PET_NODE_RANK"):
        return None
    least, _, most = get("PET_NNODES", "").partition(":")
    if not least.isdecimal() or (most or least) != least:
        raise UserError(
            f"PET_NNODES = {get('PET_NNODES', '')}: expected one number of nodes, because that of a TrainJob is fixed."
        )
    rank, port = get("PET_NODE_RANK", ""), get("PET_MASTER_PORT") or "29400"
    if not rank.isdecimal():
        raise UserError(f"PET_NODE_RANK = {rank}: expected a number from 0.")
    return Place(nodes=int(least), rank=int(rank), rendezvous=f"{address}:{port}", source="PET_* variables")


def _indexed_job(environment: Mapping[str, str]) -> Place | None:
    index = environment.get("JOB_COMPLETION_INDEX", "")
    return Place(rank=int(index), source="JOB_COMPLETION_INDEX") if index.isdecimal() else None
