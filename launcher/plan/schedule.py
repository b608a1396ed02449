"""The learning rate as a function of the step, and what becomes of it when a run gets another length. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launcher.recipe.schema import Optimizer

WSD_DECAY_SHARE = 0.1  # of all steps, at the end


def warmup_steps(optimizer: Optimizer, total_steps: int) -> int:
    """Steps of linear warm-up, from either key."""
    if optimizer.warmup_steps is not None:
        return optimizer.warmup_steps
    return round((optimizer.warmup_ratio or 0.0) * (optimizer.schedule_steps or total_steps))


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The rate of the update that follows `step` finished ones (0 for the first).

    No update is wasted on a rate of 0: the first of the warm-up has lr / warmup, and min_lr_ratio is what the update
    after the last would have. The curve is over `optimizer.schedule_steps` where that is given; behind its end the rate
    stays where it ended.
    """
    warmup = warmup_steps(optimizer, total_steps)
    total_steps = optimizer.schedule_steps or total_steps
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    floor = optimizer.min_lr_ratio
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if optimizer.schedule == "constant":
        share = 1.0
    elif optimizer.schedule == "linear":
        share = 1.0 - done * (1.0 - floor)
    elif optimizer.schedule == "cosine":
        share = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        decay = max(1, round(WSD_DECAY_SHARE * total_steps))
        share = floor + (1.0 - floor) * min(1.0, max(0, total_steps - step) / decay)
    return optimizer.lr * share


@dataclass(frozen=True, slots=True)
class Jump:
    """What another length does to the rate of a run that goes on.

    step: updates finished; old, new: rate of the next one by the curve over `old_steps` and over `new_steps`
    """

    optimizer: Optimizer
    step: int
    old: float
    new: float
    old_steps: int
    new_steps: int

    def choice(self, cause: str) -> str:
        """The question that only a person can answer, and how to.

        cause: what changed, as `train.max_steps: 50 -> 100`
        """
        next_step, schedule = self.step + 1, self.optimizer.schedule
        ended = "" if self.old_steps > self.step else ", its end, where the rate then stays"
        nothing = ", so that nothing more is learnt" if ended and self.old == 0 else ""
        return (
            f"{cause}: the learning rate of step {next_step} would jump from {self.old:.6g} to {self.new:.6g}, because "
            f"the {schedule} schedule is laid over all steps of the run. Say which curve is meant:\n"
            f"  optimizer.schedule_steps={self.old_steps}: goes on with the old one: {self.old:.6g} at step {next_step}"
            f"{ended}{nothing}\n"
            f"  optimizer.schedule_steps={self.new_steps}: lays it anew over {self.new_steps} steps: {self.new:.6g} at "
            f"step {next_step}"
        )


def jump(optimizer: Optimizer, step: int, *, old_steps: int, new_steps: int) -> Jump | None:
    """What becomes of the rate when a schedule that was laid over `old_steps` is laid over `new_steps`.

    Returns:
        None where the next update has the same rate either way, or where `optimizer.schedule_steps` says which.
    """
    if optimizer.schedule_steps is not None or old_steps == new_steps:
        return None
    old, new = (
        learning_rate(replace(optimizer, schedule_steps=steps), step, steps) for steps in (old_steps, new_steps)
    )
    return None if math.isclose(old, new, rel_tol=1e-9) else Jump(optimizer, step, old, new, old_steps, new_steps)
