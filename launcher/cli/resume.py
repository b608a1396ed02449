"""`launcher resume`: goes on with a run from its own stored recipe, with changes."""

from __future__ import annotations

import click

from launcher.cli._common import find_run


@click.command(short_help="Go on with a run, with changes listed.")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option(
    "--force", is_flag=True, help="Allow changes that make it another run (model, data, tokenizer, seed, batch)."
)
def command(run: str, overrides: tuple[str, ...], force: bool) -> int:
    """Go on with a run on this machine from its newest checkpoint; make no new run.

    Each changed key is listed. The recipe is the one stored in the run directory. Exit codes: see `launcher run`.

    example: launcher resume runs/tiny-cpu train.max_steps=100
    """
    from launcher.jobs.console import Console
    from launcher.jobs.opening import stored_recipe
    from launcher.jobs.supervisor import launch

    return launch(stored_recipe(find_run(run), overrides), force=force, console=Console(), reason="resume")
