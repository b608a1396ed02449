"""How ranks are laid out: how many copies of the model there are and how many ranks share one."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Mesh:
    """replicate: copies of the model state; shard: ranks that share one copy; their product is the number of ranks."""

    replicate: int
    shard: int


def make_mesh(recipe: Recipe) -> Mesh:
    """Both axes, the one that the recipe leaves open filled in; `launcher.recipe.check` has proven that they fit."""
    world, strategy = world_size(recipe), recipe.strategy
    if strategy.kind == "ddp":
        return Mesh(world, 1)
    if strategy.kind != "fsdp2":
        return Mesh(1, world)
    shard = strategy.shard or world // (strategy.replicate or 1)
    return Mesh(strategy.replicate or world // shard, shard)


def world_size(recipe: Recipe) -> int:
    """Ranks of the whole job."""
    return recipe.cluster.nodes * recipe.cluster.nproc_per_node
