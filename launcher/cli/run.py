"""`launcher run`: trains a recipe on this machine, or goes on with its run if that exists."""

from __future__ import annotations

import click


@click.command(short_help="Train here; resumes if the run exists.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--force", is_flag=True, help="Go on even where the recipe has become that of another run.")
def command(recipe: str, overrides: tuple[str, ...], force: bool) -> int:
    """Train a recipe on this machine; start no other machine.

    A run that exists goes on from its newest checkpoint, and what changed in the recipe is listed.
    Ends with 0 finished, 1 failed, 2 a mistake in recipe or data, 75 stopped with a checkpoint (start again).
    Ctrl-C, SIGTERM and SIGUSR1 checkpoint and stop; a second Ctrl-C ends at once.

    example: launcher run recipes/tiny-cpu.yaml train.max_steps=5
    """
    from launcher.jobs.console import Console
    from launcher.jobs.supervisor import launch
    from launcher.recipe.check import load

    return launch(load(recipe, overrides).recipe, force=force, console=Console())
