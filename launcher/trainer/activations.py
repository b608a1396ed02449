"""What the forward pass keeps for the backward pass: nothing changes, or parts are recomputed, or moved to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.trainer.model import TrainedModel


def apply(module: TrainedModel, mode: str) -> str:
    """Set up `model.gradient_checkpointing` on a built model; a clause for the log.

    Dropout draws the same mask again (`preserve_rng_state`).
    """
    lm = module.lm
    arguments = {"use_reentrant": False, "preserve_rng_state": True}
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable(arguments)
    return "every decoder block is recomputed in the backward pass"
