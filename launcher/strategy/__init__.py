"""Engine settings of a plan, as plain dicts: what a job asks of its engine, stored with the job for people to read."""

from __future__ import annotations

import importlib
from typing import Any

from launcher.plan import Plan
from launcher.recipe.schema import Recipe

_MODULES = {"ddp": "launcher.strategy.ddp", "fsdp2": "launcher.strategy.fsdp2"}


def engine_settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Settings of the recipe's strategy; key `engine` names it."""
    settings: dict[str, Any] = importlib.import_module(_MODULES[recipe.strategy.kind]).settings(recipe, plan)
    return {"engine": recipe.strategy.kind, **settings}
