"""The loss on the evaluation rows: one reduction an evaluation, the same weights and normalisation as in training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from launcher.data.batches import eval_batches
from launcher.data.store import Store
from launcher.trainer.engines import Engine
from launcher.trainer.objectives import to_batch


def evaluate(engine: Engine, store: Store, *, micro_batch_size: int, rank: int, world_size: int, backend: str) -> float:
    """Mean weighted negative log likelihood over all evaluation tokens, in nats; collective."""
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for micro in eval_batches(store, micro_batch_size=micro_batch_size, world_size=world_size, rank=rank):
        total += engine.evaluate(to_batch(micro, backend=backend).to(engine.device))
    dist.all_reduce(total)
    return float(total) / float(store.row_weight.sum())
