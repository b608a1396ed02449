"""This machine as a node of a job: limits, memory, disk, names; what a recipe needs of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.jobs.checks import Needs, judge
from launcher.jobs.facts import facts
from launcher.jobs.finding import Finding
from launcher.plan import make_plan
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory


def node(recipe: Recipe | None, folder: Path) -> Iterator[Finding]:
    """What the preflight of a job would say of this machine, and what is well.

    folder: where the run lies, or will
    """
    needs = Needs.of(recipe, make_plan(recipe), RunDirectory(folder)) if recipe else None
    yield from judge([facts(recipe, folder)], needs)
