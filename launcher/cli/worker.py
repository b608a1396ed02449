"""`launcher worker`: one node's part of a job on a run that exists; what schedulers start on each node."""

from __future__ import annotations

import click

from launcher.cli._common import find_run


@click.command(short_help="One node's part of a job, as schedulers start it.")
@click.argument("run")
@click.option(
    "--nodes", type=int, envvar="LAUNCHER_NODES", help="Machines of the job.  [default: those of the run's plan]"
)
@click.option(
    "--node-rank", type=int, default=0, envvar="LAUNCHER_NODE_RANK", show_default=True, help="This machine's number."
)
@click.option("--rendezvous", envvar="LAUNCHER_RENDEZVOUS", help="HOST:PORT on node 0; needed with more than one node.")
def command(run: str, nodes: int | None, node_rank: int, rendezvous: str | None) -> int:
    """Do one node's part of a job: start its ranks and stop them; create no run, start no other node.

    Node 0 holds the run's lease, prepares the data and keeps the ledger; the others wait for it. The options are
    also read from LAUNCHER_NODES, LAUNCHER_NODE_RANK and LAUNCHER_RENDEZVOUS. Exit codes: see `launcher run`.

    example: launcher worker runs/big --node-rank 1 --rendezvous node0:29400
    """
    from launcher.jobs.console import Console
    from launcher.jobs.worker import work

    return work(find_run(run), nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, console=Console())
