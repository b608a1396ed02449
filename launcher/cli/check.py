"""`launcher check`: says everything that is wrong with recipes and writes nothing."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from launcher.cli._common import load_recipe
from launcher.errors import EXIT_FINISHED, EXIT_USER_ERROR, RecipeError


@click.command(short_help="Say everything that is wrong with recipes.")
@click.argument("arguments", nargs=-1, metavar="RECIPE... [KEY=VALUE ...]", required=True)
@click.option("--target", help="Check for this one.  [default: cluster.target of each recipe]")
@click.option("--json", "as_json", is_flag=True, help="Print a list with one object a recipe (docs/recipe.md).")
def command(arguments: tuple[str, ...], target: str | None, as_json: bool) -> int:
    """Say everything that is wrong with one or more recipes, each problem with its line; start nothing.

    What the target cannot do is among it. Ends with 2 when there is a problem, else 0. KEY=VALUE changes every
    recipe given.

    example: launcher check recipes/*.yaml cluster.nodes=4
    """
    recipes = [word for word in arguments if _is_recipe(word)]
    overrides = [word for word in arguments if not _is_recipe(word)]
    if not recipes:
        raise click.UsageError("There is no RECIPE among the arguments, only KEY=VALUE.")
    reports = [_report(recipe, overrides, target) for recipe in recipes]
    if as_json:
        print(json.dumps([report for report, _ in reports], indent=2))
    else:
        for report, text in reports:
            print(text, file=sys.stdout if report["ok"] else sys.stderr)
    return EXIT_FINISHED if all(report["ok"] for report, _ in reports) else EXIT_USER_ERROR


def _is_recipe(word: str) -> bool:
    return ("=" not in word and not word.startswith("~")) or os.path.isfile(word)


def _report(recipe: str, overrides: list[str], target: str | None) -> tuple[dict[str, Any], str]:
    """What --json prints for one recipe, and the text for people."""
    try:
        load_recipe(recipe, overrides, target)
    except RecipeError as error:
        problems = [
            {"key": p.key, "value": _jsonable(p.value), "expected": p.expected, "fix": p.fix, "where": p.where}
            for p in error.problems
        ]
        return {"recipe": recipe, "ok": False, "problems": problems}, str(error)
    return {"recipe": recipe, "ok": True, "problems": []}, f"{recipe}: ok"


def _jsonable(value: Any) -> Any:
    """JSON has no infinity and no not-a-number: they are shown as text."""
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
