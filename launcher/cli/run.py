"""`launcher run`: trains a recipe on this machine, or goes on with its run if that exists."""

from __future__ import annotations

import click


@click.command(short_help="Train here; resumes if the run exists.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--force", is_flag=True, help="Go on even where the recipe has become that of another run.")
@click.option("--nodes", type=int, help="Machines, each of which starts this by hand.  [default: cluster.nodes]")
@click.option("--node-rank", type=int, help="This machine's number, from 0.")
@click.option("--rendezvous", help="HOST:PORT, an address of node 0 and a free port there; or auto under a scheduler.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    force: bool,
    nodes: int | None,
    node_rank: int | None,
    rendezvous: str | None,
) -> int:
    """Train a recipe on this machine; start no other machine.

    A run that exists goes on from its newest checkpoint, and what changed in the recipe is listed.
    On several machines start it on each, with the same recipe and another --node-rank.
    Ends with 0 finished, 1 failed, 2 a mistake in recipe or data, 75 stopped with a checkpoint (start again).
    Ctrl-C, SIGTERM and SIGUSR1 checkpoint and stop; a second Ctrl-C ends at once.

    example: launcher run recipes/tiny-cpu.yaml train.max_steps=5
    """
    from launcher.jobs.console import Console
    from launcher.recipe.check import load

    if (nodes, node_rank, rendezvous) == (None, None, None):
        from launcher.jobs.supervisor import launch

        return launch(load(recipe, overrides).recipe, force=force, console=Console())
    from launcher.jobs.place import find_place
    from launcher.jobs.worker import launch_node

    place = find_place(nodes=nodes, node_rank=node_rank, rendezvous=rendezvous)
    changes = [*overrides, *([] if place.nodes is None else [f"cluster.nodes={place.nodes}"])]
    return launch_node(load(recipe, changes).recipe, place, force=force, console=Console())
