"""The loss on each evaluation set: one reduction for all, the same weights and normalisation as in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.data.batches import eval_batches
from launcher.data.store import Store
from launcher.trainer.beat import beat
from launcher.trainer.engines import Engine
from launcher.trainer.objectives import to_batch


@dataclass(frozen=True, slots=True)
class EvalLosses:
    """Mean weighted negative log likelihood in nats.

    total: over the tokens of all sets together
    sets: of each set, by name
    """

    total: float
    sets: dict[str, float]


def evaluate(
    engine: Engine, sets: Mapping[str, Store], *, micro_batch_size: int, rank: int, world_size: int, backend: str
) -> EvalLosses:
    """Evaluate every set; collective."""
    totals = torch.zeros(len(sets), dtype=torch.float64, device=engine.device)
    for number, store in enumerate(sets.values()):
        for micro in eval_batches(store, micro_batch_size=micro_batch_size, world_size=world_size, rank=rank):
            beat("eval")
            totals[number] += engine.evaluate(to_batch(micro, backend=backend).to(engine.device))
    dist.all_reduce(totals)
    sums = totals.tolist()
    weights = [float(store.row_weight.sum()) for store in sets.values()]
    losses = {name: loss / weight for name, loss, weight in zip(sets, sums, weights, strict=True)}
    return EvalLosses(sum(sums) / sum(weights), losses)
