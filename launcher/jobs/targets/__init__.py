"""Targets by name: each module turns a job spec into text, hands it over and asks about it (`launcher.jobs.job`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import cast

from launcher.errors import Problem, UserError, nearest
from launcher.jobs.job import Target
from launcher.jobs.spec import JobSpec, Rendered, bare_spec
from launcher.recipe.schema import Recipe

TARGETS = {
    "torchrun": "launcher.jobs.targets.torchrun",
    "accelerate": "launcher.jobs.targets.accelerate",
    "slurm": "launcher.jobs.targets.slurm",
    "ray": "launcher.jobs.targets.ray",
    "kubernetes": "launcher.jobs.targets.kubernetes",
}


def find(name: str) -> Target:
    """The module of a target, imported now.

    Raises:
        UserError: no such target; the text names those that exist.
    """
    require(name)
    return cast(Target, importlib.import_module(TARGETS[name]))


def require(name: str) -> None:
    """Raises UserError where no target is called so."""
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"--target {name}: expected one of {known}. {nearest(name, TARGETS)}".rstrip())


def render(spec: JobSpec, *, target: str) -> Rendered:
    """The job as the target's files and command.

    Raises:
        UserError: no such target.
    """
    return find(target).render(spec)


def problems(recipe: Recipe) -> Iterator[Problem]:
    """What of a recipe its own `cluster.target` cannot do; a rule for `launcher.recipe.check.load`."""
    if recipe.cluster.target in TARGETS:
        yield from find(recipe.cluster.target).problems(bare_spec(recipe))
