"""`launcher preview`: shows the first rows of training as tokens, so that masks and borders can be seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.data.prepare import Prepared
    from launcher.data.preview import Begin
    from launcher.recipe.schema import Recipe


@click.command(short_help="Show rows as tokens, with trained tokens and document borders visible.")
@click.argument("recipe", metavar="RECIPE|RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("-n", "--rows", type=click.IntRange(min=1), help="How many rows.  [default: 3, with --step all]")
@click.option("--step", type=click.IntRange(min=1), help="The global batch of this step, instead of the first rows.")
@click.option("--json", "as_json", is_flag=True, help="Print rows and counts as one object (docs/data.md).")
@click.option("--html", metavar="FILE", help="Write a page for a browser instead; it needs no network.")
def command(
    recipe: str, overrides: tuple[str, ...], rows: int | None, step: int | None, as_json: bool, html: str | None
) -> None:
    """Show the first rows that training will see, or those of one step; prepares data if need be, trains nothing.

    Trained tokens are green on a terminal, and stand between [[ and ]] elsewhere; a weight other than 1 follows them.
    Of a run its own rows are shown: --step is that of metrics.jsonl and left-out.jsonl.

    \b
    example: launcher preview recipes/tiny-cpu.yaml -n 1 --html rows.html
    example: launcher preview runs/quickstart --step 120
    """
    from launcher.cli.prepare import summary
    from launcher.recipe.presets import recipe_file

    if as_json and html is not None:
        raise UserError("--json prints, --html writes a page: give one of the two.")
    begin: Begin = (0, None)
    if recipe_file(recipe) is not None or recipe.endswith((".yaml", ".yml")):
        loaded, prepared = _prepared(recipe, overrides)
    else:
        loaded, prepared, begin = _of_run(recipe, overrides, step)
    from launcher.data.preview import lines, preview

    if step is not None and step > prepared.total_steps:
        raise UserError(f"--step {step}: expected 1 to {prepared.total_steps}, the steps of this run.")
    shown = preview(loaded, prepared, rows=rows or (3 if step is None else None), step=step, begin=begin)
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


def _prepared(recipe: str, overrides: tuple[str, ...]) -> tuple[Recipe, Prepared]:
    from launcher.cli.prepare import progress_shown
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    require_train_extra()
    from launcher.data.prepare import prepare

    with progress_shown() as progress:
        return loaded, prepare(loaded, progress=progress)


def _of_run(text: str, overrides: tuple[str, ...], step: int | None) -> tuple[Recipe, Prepared, Begin]:
    """A run's recipe, its data, and of a stream where reading begins: in the newest checkpoint before the step."""
    from launcher.cli._common import find_run
    from launcher.jobs.environment import require_train_extra
    from launcher.jobs.opening import stored_recipe
    from launcher.run.data import require_current
    from launcher.run.directory import RunDirectory
    from launcher.run.ledger import valid_checkpoints

    if overrides:
        raise UserError(f"{overrides[0]}: the rows of a run are fixed. Give its recipe to see others.")
    require_train_extra()
    from launcher.data.prepare import Prepared

    run = RunDirectory(find_run(text).path.absolute())
    if not run.data_file.exists():
        raise UserError(f"{run.path}: its data are not prepared yet. `launcher prepare {run.recipe_file}` does it.")
    data = run.read_json(run.data_file.name)
    require_current(run, data)
    data.pop("version")
    prepared = Prepared(**data, built=False)
    before = [found for found in valid_checkpoints(run) if step is not None and found.step < step]
    if not prepared.train.get("streaming") or not before:
        return stored_recipe(run), prepared, (0, None)
    from launcher.trainer.checkpoint.lanes import read_lanes
    from launcher.trainer.checkpoint.reader import read_manifest

    newest = before[-1]
    manifest = read_manifest(newest.path, run_id=run.read_json(run.run_file.name)["run_id"])
    states = read_lanes(newest.path, manifest, range(prepared.train["lanes"]))
    return stored_recipe(run), prepared, (newest.step, states)


def _write_page(path: Path, shown: dict[str, Any], recipe: str) -> None:
    from launcher.data.page import page

    try:
        path.write_text(page(shown, name=Path(recipe).stem), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}.") from error
    click.echo(f"page  {path}")
