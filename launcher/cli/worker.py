"""`launcher worker`: one node's part of a job; what schedulers start on each node."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli._common import RUNS_DIR, find_run
from launcher.run.directory import RunDirectory


@click.command(short_help="One node's part of a job, as schedulers start it.")
@click.argument("run")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),  # type: ignore[type-var]
    help="Make RUN from this recipe, or open it with the recipe at a job's first start.",
)
@click.option(
    "--nodes",
    type=int,
    envvar="LAUNCHER_NODES",
    help="Machines of the job.  [default: the scheduler's or the run's]",
)
@click.option("--node-rank", type=int, envvar="LAUNCHER_NODE_RANK", help="This machine's number, from 0.")
@click.option(
    "--rendezvous", envvar="LAUNCHER_RENDEZVOUS", help="HOST:PORT on node 0, or auto.  [default: the scheduler's]"
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND ...]")
def command(
    run: str,
    recipe: Path | None,
    nodes: int | None,
    node_rank: int | None,
    rendezvous: str | None,
    command: tuple[str, ...],
) -> int:
    """Do one node's part of a job: start its ranks and stop them; start no other node.

    Node 0 holds the run's lease, prepares the data and keeps the ledger; the others wait for it. With COMMAND, which
    starts the ranks of every node, this is the job's only worker. The options are also read from LAUNCHER_NODES,
    LAUNCHER_NODE_RANK and LAUNCHER_RENDEZVOUS, and what is missing from Slurm's, Kubeflow's or an Indexed Job's
    variables. Ends with 0 finished, 75 start me again, 1 stopped for good, 2 a mistake in recipe or options.

    example: launcher worker runs/big --node-rank 1 --rendezvous node0:29400
    """
    from launcher.jobs.console import Console
    from launcher.jobs.worker import work

    return work(
        find_run(run) if recipe is None else _place(run),
        recipe_file=recipe,
        nodes=nodes,
        node_rank=node_rank,
        rendezvous=rendezvous,
        command=command,
        console=Console(),
    )


def _place(text: str) -> RunDirectory:
    """Where the run lies or is to be made: a path, or a name below runs/."""
    for path in (Path(text), Path(RUNS_DIR, text)):
        if (run := RunDirectory(path)).exists():
            return run
    return RunDirectory(Path(text) if "/" in text else Path(RUNS_DIR, text))
