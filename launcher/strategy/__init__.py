"""Engine settings of a plan, each with its reason, and as the plain dict that is stored with the job."""

from __future__ import annotations

import importlib
from typing import Any

from launcher.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.strategy.explained import Explained, nested

_MODULES = {
    "ddp": "launcher.strategy.ddp",
    "fsdp2": "launcher.strategy.fsdp2",
    "zero1": "launcher.strategy.deepspeed",
    "zero2": "launcher.strategy.deepspeed",
    "zero3": "launcher.strategy.deepspeed",
}


def explain(recipe: Recipe, plan: Plan) -> Explained:
    """Settings of the recipe's strategy by dotted key, with the reason for each."""
    explained: Explained = importlib.import_module(_MODULES[recipe.strategy.kind]).settings(recipe, plan)
    return explained


def engine_settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The settings alone. For ZeRO this is DeepSpeed's own configuration, as its loader takes it."""
    return nested(explain(recipe, plan))


def settings_file(recipe: Recipe) -> str:
    """Name of the file in a job that holds them."""
    return "deepspeed.json" if recipe.strategy.kind.startswith("zero") else f"{recipe.strategy.kind}.json"
