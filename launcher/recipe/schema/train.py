"""Section `train`: how long and in what portions the model learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.errors import Problem

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class Train:
    """How long and in what portions the model learns.

    global_batch_size: rows in one optimizer step, over all ranks
    micro_batch_size: rows on one rank in one forward pass; accumulation follows
    max_steps: optimizer steps; null: set by epochs
    epochs: passes over the training rows, fractions allowed; null: set by max_steps
    seed: decides random weights, row order and dropout
    precision: type of the arithmetic; auto: bf16 where the device computes it natively, else fp32
    tf32: let fp32 matrix products run in TF32 on a GPU (10 bits of mantissa): faster, and no longer exact fp32
    max_grad_norm: clip the gradient of the whole model to this norm; null: never
    eval_every_steps: evaluate before the first step, each so many steps and at the end; null: at the end only
    on_nonfinite: a loss or gradient that is not finite ends the run (stop), drops that step's update (skip), or takes
        the run back to its last checkpoint and leaves that global batch out (rollback)
    on_spike: the same for a loss far above what it was, or a line in the log (warn), or nothing (ignore)
    spike_sigmas: how far above the median of the last spike_window losses counts as a spike, in standard deviations as
        the median absolute deviation estimates them, at least 1 % of the median each
    spike_window: how many of the last losses that median is taken of; none is a spike before a quarter of them, and 8,
        are known
    max_skips: global batches in a row that may make no update; when so many were skipped the run goes back to its last
        checkpoint without them, and one more ends it
    replica_check_steps: compare each so many steps, and before each checkpoint, what ranks hold in common (the weights
        of ddp, zero1, zero2 and copies of fsdp2), and name a rank that differs; null: never
    """

    global_batch_size: int = MISSING  # type: ignore[assignment]
    micro_batch_size: int = 1
    max_steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = False
    max_grad_norm: float | None = 1.0
    eval_every_steps: int | None = None
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "warn"
    spike_sigmas: float = 8.0
    spike_window: int = 128
    max_skips: int = 10
    replica_check_steps: int | None = None


def check(train: Train) -> Iterator[Problem]:
    """Rules of this section alone."""
    for key in ("global_batch_size", "micro_batch_size"):
        if getattr(train, key) < 1:
            yield Problem(f"train.{key}", getattr(train, key), "1 row or more")
    if (train.max_steps is None) == (train.epochs is None):
        both = train.max_steps is not None
        yield Problem(
            "train.max_steps", train.max_steps, "either train.max_steps or train.epochs",
            "Write null for one of the two." if both else "Give one of them.", because=("train.epochs",),
        )  # fmt: skip
    if train.max_steps is not None and train.max_steps < 1:
        yield Problem("train.max_steps", train.max_steps, "1 step or more")
    if train.epochs is not None and train.epochs <= 0:
        yield Problem("train.epochs", train.epochs, "a number above 0")
    if train.max_grad_norm is not None and train.max_grad_norm <= 0:
        yield Problem(
            "train.max_grad_norm", train.max_grad_norm, "a number above 0", "Write null to leave gradients unclipped."
        )
    if train.eval_every_steps is not None and train.eval_every_steps < 1:
        yield Problem("train.eval_every_steps", train.eval_every_steps, "1 step or more, or null")
    if train.spike_sigmas <= 0:
        yield Problem("train.spike_sigmas", train.spike_sigmas, "a number above 0")
    if not 8 <= train.spike_window <= 10_000:
        yield Problem("train.spike_window", train.spike_window, "8 to 10000 steps")
    if train.max_skips < 1:
        yield Problem("train.max_skips", train.max_skips, "1 or more")
    if train.replica_check_steps is not None and train.replica_check_steps < 1:
        yield Problem("train.replica_check_steps", train.replica_check_steps, "1 step or more, or null")
    if train.seed < 0:
        yield Problem("train.seed", train.seed, "0 or more")
