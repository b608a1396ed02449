"""`launcher preview`: shows the first rows of training as tokens, so that masks and borders can be seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from launcher.errors import UserError


@click.command(short_help="Show rows as tokens, with trained tokens and document borders visible.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("-n", "--rows", default=3, show_default=True, type=click.IntRange(min=1), help="How many rows.")
@click.option("--json", "as_json", is_flag=True, help="Print rows and counts as one object (docs/data.md).")
@click.option("--html", metavar="FILE", help="Write a page for a browser instead; it needs no network.")
def command(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool, html: str | None) -> None:
    """Show the first rows that training will see; prepares the data if need be, trains nothing.

    Trained tokens are green on a terminal, and stand between [[ and ]] elsewhere; a weight other than 1 follows them.

    example: launcher preview recipes/tiny-cpu.yaml -n 1 --html rows.html
    """
    from launcher.cli.prepare import progress_shown, summary
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    if as_json and html is not None:
        raise UserError("--json prints, --html writes a page: give one of the two.")
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
    if html is not None:
        _write_page(Path(html), shown, recipe)
    else:
        for line in lines(shown, colour=sys.stdout.isatty()):
            click.echo(line)
    for line in summary(prepared):
        click.echo(line)


def _write_page(path: Path, shown: dict[str, Any], recipe: str) -> None:
    from launcher.data.page import page

    try:
        path.write_text(page(shown, name=Path(recipe).stem), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}.") from error
    click.echo(f"page  {path}")
