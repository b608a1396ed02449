"""Section `optimizer`: how a gradient becomes an update, and how the learning rate moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Optimizer:
    """How a gradient becomes an update, and how the learning rate moves.

    kind: adamw, decoupled weight decay (arXiv:1711.05101)
    lr: highest learning rate
    betas: decay of the first and the second moment
    eps: added to the root of the second moment
    weight_decay: applied to matrices only, not to norms and biases
    schedule: shape after the warm-up; wsd stays at lr and falls linearly over the last tenth of the steps
    warmup_steps: steps of linear warm-up; exclusive with warmup_ratio
    warmup_ratio: the same as a share of all steps, 0 to 1
    min_lr_ratio: where the schedule ends, as a share of lr
    schedule_steps: steps over which schedule and warm-up ratio are laid; the rate then stays where it ended; null: all
        steps of the run. A run that gets another length asks for it where the rate would jump
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 2.0e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    min_lr_ratio: float = 0.0
    schedule_steps: int | None = None


def check(optimizer: Optimizer) -> Iterator[Problem]:
    """Rules of this section alone."""
    if optimizer.lr <= 0:
        yield Problem("optimizer.lr", optimizer.lr, "a number above 0")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Problem("optimizer.betas", optimizer.betas, "two numbers from 0 to below 1", "Write e.g. [0.9, 0.95].")
    if optimizer.eps <= 0:
        yield Problem("optimizer.eps", optimizer.eps, "a number above 0")
    if optimizer.weight_decay < 0:
        yield Problem("optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    if optimizer.warmup_steps is not None and optimizer.warmup_ratio is not None:
        yield Problem(
            "optimizer.warmup_ratio", optimizer.warmup_ratio, "null when warmup_steps is given", "Keep one of the two."
        )
    if optimizer.warmup_steps is not None and optimizer.warmup_steps < 0:
        yield Problem("optimizer.warmup_steps", optimizer.warmup_steps, "0 steps or more")
    if optimizer.warmup_ratio is not None and not 0 <= optimizer.warmup_ratio <= 1:
        yield Problem("optimizer.warmup_ratio", optimizer.warmup_ratio, "a share from 0 to 1")
    if not 0 <= optimizer.min_lr_ratio <= 1:
        yield Problem("optimizer.min_lr_ratio", optimizer.min_lr_ratio, "a share from 0 to 1")
    if optimizer.schedule_steps is not None and optimizer.schedule_steps < 1:
        yield Problem("optimizer.schedule_steps", optimizer.schedule_steps, "1 step or more, or null")
    elif optimizer.schedule_steps is not None and optimizer.schedule == "constant" and not optimizer.warmup_ratio:
        expected = "null with schedule = constant and no warmup_ratio, which has no end"
        fix = "Remove the key."
        because = ("optimizer.schedule", "optimizer.warmup_ratio")
        yield Problem("optimizer.schedule_steps", optimizer.schedule_steps, expected, fix, because=because)
