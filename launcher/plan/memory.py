"""What each rank must hold of the model state, in bytes: weights, gradients, moments; activations are not counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import Problem
from launcher.plan.mesh import Mesh
from launcher.plan.parameters import Weight
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from launcher.plan import Plan

BYTES = {"fp32": 4, "bf16": 2}
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest rank. Exact: `fully_shard` deals each parameter by its first dimension, rounded up."""

    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def model_state(found: Sequence[Weight], mesh: Mesh, dtype: str) -> Memory:
    """Memory of weights that stay in `dtype`, and of their gradients and AdamW's two moments in the same type."""
    elements = sum(-(-w.shape[0] // mesh.shard) * math.prod(w.shape[1:]) * w.times for w in found)
    return Memory(elements * BYTES[dtype], elements * BYTES[dtype], 2 * elements * BYTES[dtype])


def memory_problems(recipe: Recipe, plan: Plan) -> Iterator[Problem]:
    """Complaint of model state that alone is larger than a GPU."""
    limit, offloaded = recipe.cluster.gpu_memory_gib, recipe.strategy.offload.params == "cpu"
    if limit is None or plan.memory is None or offloaded or plan.memory.total <= limit * GIB:
        return
    need = f"at least {plan.memory.total / GIB:.1f} GiB for weights, gradients and moments on each rank"
    more = "Shard over more ranks or offload" if recipe.strategy.kind != "ddp" else "Use strategy.kind=fsdp2"
    yield Problem("cluster.gpu_memory_gib", limit, need, f"{more}.")
