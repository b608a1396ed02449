"""Supervised fine-tuning: the tokens that `data.train_on` names, each with the weight the store gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from launcher.trainer.objectives import Batch

if TYPE_CHECKING:
    from launcher.data.batches import MicroBatch


def check(micro: MicroBatch) -> None:
    """Any mask fits: prompts carry no weight, and a conversation may carry any."""


def loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of weight x negative log likelihood over the trained tokens, float64, 0-d."""
    return model.weighted_nll(batch)  # type: ignore[no-any-return]
