"""Settings of torch's FSDP2 (`fully_shard`) for a plan."""

from __future__ import annotations

from launcher.plan import Plan
from launcher.plan.chosen import planned_precision
from launcher.recipe.schema import Recipe
from launcher.strategy.explained import Explained


def settings(recipe: Recipe, plan: Plan) -> Explained:
    """Each decoder block is one unit, what is left the root; gradients are reduced in fp32."""
    strategy, mesh = recipe.strategy, plan.mesh
    compute, why = planned_precision(recipe)
    offloaded, pinned = strategy.offload.params == "cpu", recipe.cluster.accelerator != "cpu"
    found: Explained = {
        "engine": ("fsdp2", "strategy.kind"),
        "mesh.replicate": (mesh.replicate, "copies of the shards (HSDP)" if mesh.replicate > 1 else "one copy"),
        "mesh.shard": (mesh.shard, f"{plan.world_size} ranks / {mesh.replicate} x the model state"),
        "units": (["each decoder block", "root"], "a block's weights are gathered together, used and freed"),
        "reshard_after_forward": (strategy.reshard_after_forward, _reshard(strategy.reshard_after_forward)),
        "prefetch": (strategy.prefetch, _prefetch(strategy.prefetch)),
        "mixed_precision.weights": (recipe.model.dtype, "model.dtype: what is sharded and updated"),
        "mixed_precision.param_dtype": (compute, why),
        "mixed_precision.reduce_dtype": ("fp32", "sums over many ranks"),
        "offload": (strategy.offload.params, "strategy.offload"),
        "gradient_sync": _sync(strategy.reshard_after_forward, copies=mesh.replicate > 1),
        "compile": (recipe.model.compile, "model.compile, each decoder block before it is sharded"),
        "recompute": (recipe.model.gradient_checkpointing, "model.gradient_checkpointing"),
    }
    if offloaded:
        copied = "page-locked memory is copied at full speed beside the arithmetic"
        found["pin_memory"] = (pinned, copied if pinned else "there is no GPU to copy to")
    return found


def _sync(after: bool | int, *, copies: bool) -> tuple[str, str]:
    if after is False:
        return "last micro-batch of a step", "the others add to whole gradients on each rank, as weights stay gathered"
    across = "; copies meet at the last of a step" if copies else ""
    return "every micro-batch", f"a rank keeps its shard of the gradient alone{across}"


def _reshard(after: bool | int) -> str:
    if after is False:
        return "weights stay gathered from forward to backward: less traffic, more memory"
    if after is True:
        return "weights are freed after the forward pass and gathered again for the backward pass"
    return "after the forward pass weights are kept in shards of so many ranks: gathered again over near links"


def _prefetch(blocks: int | None) -> str:
    if blocks is None:
        return "torch's own choice: forward as far as the host runs ahead, one block ahead in backward"
    return "blocks gathered ahead of their use, forward and backward"
