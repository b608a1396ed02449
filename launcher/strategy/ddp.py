"""Settings of torch's DistributedDataParallel for a plan."""

from __future__ import annotations

from launcher.plan import Plan
from launcher.plan.chosen import planned_precision
from launcher.recipe.schema import Recipe
from launcher.strategy.explained import Explained


def settings(recipe: Recipe, plan: Plan) -> Explained:
    """Every rank holds a whole copy; gradients are reduced once a step, in the type of the weights."""
    compute, why = planned_precision(recipe)
    return {
        "engine": ("ddp", "strategy.kind"),
        "mesh.replicate": (plan.mesh.replicate, "a whole copy on each rank"),
        "mesh.shard": (plan.mesh.shard, "nothing is sharded"),
        "weights": (recipe.model.dtype, "model.dtype"),
        "compute": (compute, why),
        "reduce": (recipe.model.dtype, "gradients have the type of the weights"),
        "gradient_sync": ("last micro-batch of a step", "the others add to gradients on each rank"),
        "gradient_as_bucket_view": (True, "gradients live in the buckets that are reduced: no second copy"),
        "broadcast_buffers": (False, "buffers are the same on each rank and never change"),
        "compile": (recipe.model.compile, "model.compile, each decoder block"),
        "recompute": (recipe.model.gradient_checkpointing, "model.gradient_checkpointing"),
    }
