"""How large a checkpoint is, in bytes: what each element's value and moments take (docs/checkpoint.md)."""

from __future__ import annotations

from launcher.plan.memory import BYTES
from launcher.plan.parameters import Parameters
from launcher.recipe.schema import Recipe


def checkpoint_bytes(recipe: Recipe, parameters: Parameters) -> int:
    """Bytes of one checkpoint of all ranks together, without headers and manifest."""
    own = BYTES[recipe.model.dtype]
    masters = recipe.strategy.kind.startswith("zero") or recipe.adapter.kind != "full"  # kept in fp32
    learnt = parameters.trainable * (4 if masters else own) * 3  # value and both moments
    frozen = (parameters.total - parameters.trainable) * own if recipe.checkpoint.store_frozen else 0
    return learnt + frozen
