"""Settings of torch's DistributedDataParallel for a plan."""

from __future__ import annotations

from typing import Any

from launcher.plan import Plan
from launcher.recipe.schema import Recipe


def settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Every rank holds a whole copy; gradients are reduced once a step, in the type of the weights."""
    return {
        "mesh": {"replicate": plan.mesh.replicate, "shard": plan.mesh.shard},
        "weights": recipe.model.dtype,
        "compute": plan.precision,
        "gradient_sync": "last micro-batch of a step",
    }
