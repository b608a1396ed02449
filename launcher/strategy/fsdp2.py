"""Settings of torch's FSDP2 (`fully_shard`) for a plan."""

from __future__ import annotations

from typing import Any

from launcher.plan import Plan
from launcher.recipe.schema import Recipe


def settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Each decoder block is one unit, what is left the root; gradients are reduced in fp32."""
    strategy = recipe.strategy
    return {
        "mesh": {"replicate": plan.mesh.replicate, "shard": plan.mesh.shard},
        "units": ["each decoder block", "root"],
        "reshard_after_forward": strategy.reshard_after_forward,
        "mixed_precision": {"weights": recipe.model.dtype, "param_dtype": plan.precision, "reduce_dtype": "fp32"},
        "offload": strategy.offload.params,
        "gradient_sync": "last micro-batch of a step",
    }
