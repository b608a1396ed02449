"""`launcher preview`: shows the first rows of training as tokens, so that masks and borders can be seen."""

from __future__ import annotations

import json
import sys

import click


@click.command(short_help="Show rows as tokens, with trained tokens and document borders visible.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("-n", "--rows", default=3, show_default=True, type=click.IntRange(min=1), help="How many rows.")
@click.option("--json", "as_json", is_flag=True, help="Print rows and counts as one object (docs/data.md).")
def command(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Show the first rows that training will see; prepares the data if need be, trains nothing.

    Trained tokens are green on a terminal, and stand between [[ and ]] elsewhere.

    example: launcher preview recipes/tiny-cpu.yaml -n 1
    """
    from launcher.cli.prepare import progress_shown, summary
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    require_train_extra()
    from launcher.data.prepare import prepare
    from launcher.data.preview import lines, preview

    with progress_shown() as progress:
        prepared = prepare(loaded, progress=progress)
    shown = preview(loaded, prepared, rows=rows)
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for line in lines(shown, colour=sys.stdout.isatty()):
        click.echo(line)
    for line in summary(prepared):
        click.echo(line)
