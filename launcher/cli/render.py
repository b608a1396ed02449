"""`launcher render`: prints the whole job a recipe would start, or the reasons for its engine settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.recipe.schema import Recipe
    from launcher.strategy.explained import Explained


@click.command(short_help="Print the job a recipe would submit; submit nothing.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--target", default="torchrun", show_default=True, help="What would start it: torchrun, accelerate.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the files into this folder instead.")
@click.option("--explain", is_flag=True, help="Print each engine setting and why it is so, in place of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print one object: command and files (docs/json.md).")
def command(
    recipe: str, overrides: tuple[str, ...], target: str, output: Path | None, explain: bool, as_json: bool
) -> None:
    """Print the job a recipe would start; start nothing, need no GPU, write files only with -o.

    \b
    example: launcher render recipes/llama3.1-8b-fsdp2.yaml cluster.nodes=4 -o job
    example: launcher render recipes/llama3.1-8b-fsdp2.yaml strategy=zero3 --explain
    """
    from launcher.jobs.spec import job_spec
    from launcher.jobs.targets import render
    from launcher.plan import make_plan
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    plan = make_plan(loaded)
    rendered = render(job_spec(loaded, plan), target=target)
    reasons = _reasons(loaded, plan, target) if explain else {}
    if output is not None:
        _write(output, rendered.files)
    if as_json:
        printed: dict[str, Any] = {"target": target, "command": rendered.command, "files": dict(rendered.files)}
        if explain:
            printed["explain"] = {file: _pairs(settings) for file, settings in reasons.items()}
        click.echo(json.dumps(printed, indent=2))
    elif explain:
        for file, settings in reasons.items():
            click.echo(f"==> {file} <==\n{_table(settings)}\n")
    elif output is not None:
        click.echo(f"wrote {', '.join(rendered.files)}\ncd {output}\n{rendered.command}")
    else:
        for name, text in rendered.files.items():
            click.echo(f"==> {name} <==\n{text}")
        click.echo(f"==> command <==\n{rendered.command}")


def _reasons(recipe: Recipe, plan: Plan, target: str) -> dict[str, Explained]:
    """File of the job -> its settings with their reasons; every file that a strategy decides."""
    from launcher.strategy import accelerate, explain, settings_file

    found = {settings_file(recipe): explain(recipe, plan)}
    if target == "accelerate":
        found["accelerate.yaml"] = accelerate.explain(recipe, plan)
    return found


def _pairs(settings: Explained) -> dict[str, dict[str, object]]:
    return {key: {"value": value, "reason": reason} for key, (value, reason) in settings.items()}


def _table(settings: Explained) -> str:
    """A line a setting: key, value as the file has it, reason."""
    rows = [(key, json.dumps(value), reason) for key, (value, reason) in settings.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for key, value, reason in rows)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    from launcher.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be written ({error.strerror})") from None
