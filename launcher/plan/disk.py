"""How large a checkpoint is: what each element's value and moments take (docs/checkpoint.md); sizes in words."""

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


def size_text(count: float) -> str:
    """Bytes for people: `3.74 GiB`."""
    for unit, scale in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.3g} {unit}"
    return f"{count / 1024:.3g} KiB"
