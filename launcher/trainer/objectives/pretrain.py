"""Pre-training: every token of a document but its first is a target, all of equal weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.errors import UserError
from launcher.trainer.objectives import Batch

if TYPE_CHECKING:
    from launcher.data.batches import MicroBatch


def check(micro: MicroBatch) -> None:
    """Refuse rows with masked tokens: they were prepared for another objective.

    A document of n tokens has n - 1 targets, so trained tokens = tokens - documents that hold any.

    Raises:
        UserError: some token of a document is not a target.
    """
    trained = int(np.count_nonzero(micro.weights))
    starts = int(np.count_nonzero(np.asarray(micro.position_ids) == 0))
    if trained and trained < micro.tokens - starts:
        raise UserError(
            f"objective.kind = pretrain: {micro.tokens - starts - trained} tokens of rows {micro.rows} are masked. "
            "Use objective.kind=sft, or prepare plain text."
        )


def loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the negative log likelihoods of all targets, float64, 0-d."""
    return model.weighted_nll(batch)  # type: ignore[no-any-return]
