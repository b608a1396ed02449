"""The typed shape of a recipe: one dataclass a section, standard library only, so that both sides can read it."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from launcher.errors import Problem
from launcher.recipe.schema import adapter as _adapter
from launcher.recipe.schema import checkpoint as _checkpoint
from launcher.recipe.schema import cluster as _cluster
from launcher.recipe.schema import data as _data
from launcher.recipe.schema import logging as _logging
from launcher.recipe.schema import model as _model
from launcher.recipe.schema import optimizer as _optimizer
from launcher.recipe.schema import run as _run
from launcher.recipe.schema import strategy as _strategy
from launcher.recipe.schema import train as _train
from launcher.recipe.schema.adapter import Adapter
from launcher.recipe.schema.checkpoint import Checkpoint
from launcher.recipe.schema.cluster import Cluster
from launcher.recipe.schema.data import MISSING, Data, Source
from launcher.recipe.schema.logging import Logging
from launcher.recipe.schema.model import Model
from launcher.recipe.schema.objective import Objective
from launcher.recipe.schema.optimizer import Optimizer
from launcher.recipe.schema.run import Run
from launcher.recipe.schema.strategy import Offload, Strategy, Zero
from launcher.recipe.schema.train import Train

__all__ = [
    "MISSING", "Adapter", "Checkpoint", "Cluster", "Data", "Logging", "Model", "Objective", "Offload", "Optimizer",
    "Recipe", "Run", "Source", "Strategy", "Train", "Zero", "check_sections", "from_dict", "to_dict",
]  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Recipe:
    """What a user writes, whole.

    run: what the run is called and where its directory lies
    model: which weights or architecture are trained
    adapter: which parameters learn
    objective: what is minimised
    data: which records are learnt, and which of their tokens
    train: how long and in what portions the model learns
    optimizer: how a gradient becomes an update
    strategy: how model state is spread over the ranks
    checkpoint: when checkpoints are written and which are kept
    logging: how often figures are written
    cluster: the machines a run asks for
    """

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    strategy: Strategy = field(default_factory=Strategy)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    cluster: Cluster = field(default_factory=Cluster)


def check_sections(recipe: Recipe) -> Iterator[Problem]:
    """Every section's own rules; rules between sections are in `launcher.recipe.check`."""
    for name, check in _CHECKS.items():
        yield from check(getattr(recipe, name))


_CHECKS: dict[str, Callable[[Any], Iterator[Problem]]] = {
    "run": _run.check,
    "model": _model.check,
    "adapter": _adapter.check,
    "data": _data.check,
    "train": _train.check,
    "optimizer": _optimizer.check,
    "strategy": _strategy.check,
    "checkpoint": _checkpoint.check,
    "logging": _logging.check,
    "cluster": _cluster.check,
}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dicts and lists, ready for YAML or JSON."""
    return asdict(recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` made; values are trusted (they were checked when the run was made).

    Raises:
        TypeError: a key that this version's schema does not know.
    """
    return _build(Recipe, values)


def _build(kind: Any, values: Any) -> Any:
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := set(values) - known:
        raise TypeError(f"unknown keys {sorted(unknown)} in {kind.__name__}: the recipe was written by another version")
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return None if value is None else _convert(inner[0], value)
    if is_dataclass(hint):
        return _build(hint, value)
    if typing.get_origin(hint) is list and is_dataclass(typing.get_args(hint)[0]):
        return [_build(typing.get_args(hint)[0], item) for item in value]
    return value
