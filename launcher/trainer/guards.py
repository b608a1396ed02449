"""What becomes of a step whose figures are wrong: a loss that is not finite, or one far above those before it.

Pure: it sees the figures that all ranks have agreed on, in order of steps, so every rank comes to the same end. Its
state is part of a checkpoint, so a resumed run judges as the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from launcher.trainer.failures import NonFiniteError, RollBack, SpikeError

if TYPE_CHECKING:
    from launcher.recipe.schema import Train
    from launcher.run.left_out import Reason

LAG = 2  # the limit of a step rests on losses that are known when it is sent to the device: those of two steps before
LEAST_HISTORY = 8  # losses, and a quarter of the window, before anything counts as a spike
SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution in median absolute deviations
SMALLEST_SIGMA = 0.01  # of the median: losses that hardly move are no reason to call a small rise a spike


@dataclass(frozen=True, slots=True)
class Judged:
    """What a step was.

    skipped: it made no update, on every rank
    """

    reason: Reason | None = None
    skipped: bool = False


@dataclass(slots=True)
class Guards:
    """The rules of section `train`, and what they have seen.

    losses: (step, loss) of the last updates that were made, ascending
    skipped, left_out, spikes: steps so far; a spike may have been skipped, learnt from or left out
    row: steps in a row, up to the last one, that were skipped
    in_a_row: of them and of those that were left out
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "warn"
    sigmas: float = 8.0
    window: int = 128
    max_skips: int = 10
    losses: deque[tuple[int, float]] = field(default_factory=deque)
    skipped: int = 0
    left_out: int = 0
    spikes: int = 0
    row: list[int] = field(default_factory=list)
    in_a_row: int = 0

    @classmethod
    def of(cls, train: Train) -> Guards:
        """As a recipe asks."""
        return cls(train.on_nonfinite, train.on_spike, train.spike_sigmas, train.spike_window, train.max_skips)

    @property
    def drops_spikes(self) -> bool:
        """Whether the update itself has to wait for the loss of the global batch."""
        return self.on_spike == "skip"

    def limit(self, step: int) -> float:
        """What the loss of a step is a spike above: median + sigmas x deviation; infinite with too few losses."""
        known = [loss for at, loss in self.losses if at <= step - LAG][-self.window :]
        if self.on_spike == "ignore" or len(known) < max(LEAST_HISTORY, self.window // 4):
            return math.inf
        middle = median(known)
        deviation = SIGMA_OF_MAD * median(abs(loss - middle) for loss in known)
        return middle + self.sigmas * max(deviation, SMALLEST_SIGMA * abs(middle))

    def judge(self, step: int, loss: float, *, nonfinite: bool) -> Judged:
        """Take the figures of a step, the same on every rank; steps come in order.

        Args:
            step: of the update, from 1
            nonfinite: its gradient was not finite, so its update was dropped
        Raises:
            NonFiniteError, SpikeError: the run ends.
            RollBack: it goes back to its last checkpoint.
        """
        limit = self.limit(step)
        if nonfinite:
            return self._without_update(step, loss, None)
        if not loss > limit:
            self._learnt(step, loss)
            return Judged()
        self.spikes += 1
        if self.on_spike == "stop":
            raise SpikeError(f"{_spike(step, loss, limit)}. Look at its rows, or set train.on_spike=rollback.")
        if self.on_spike == "warn":
            self._learnt(step, loss)
            return Judged("spike")
        return self._without_update(step, loss, limit)

    def leave(self) -> None:
        """A step was left out, as an attempt before had written down."""
        self.left_out += 1
        self.in_a_row += 1
        self.row.clear()  # what was skipped before it is nothing that a step back could save

    def counts(self) -> dict[str, int]:
        """Steps so far of which there is something to say, for metrics.jsonl; empty where there is nothing."""
        found = {"steps_skipped": self.skipped, "steps_left_out": self.left_out, "loss_spikes": self.spikes}
        return {key: count for key, count in found.items() if count}

    def state(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint; `load` is the way back."""
        return {
            "losses": [list(one) for one in self.losses], "skipped": self.skipped, "left_out": self.left_out,
            "spikes": self.spikes, "row": list(self.row), "in_a_row": self.in_a_row,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of before 0.5.0 has no such state, and the guards begin anew."""
        self.losses = deque((int(step), float(loss)) for step, loss in state.get("losses", ()))
        self.skipped, self.left_out = int(state.get("skipped", 0)), int(state.get("left_out", 0))
        self.spikes, self.in_a_row = int(state.get("spikes", 0)), int(state.get("in_a_row", 0))
        self.row = [int(step) for step in state.get("row", ())]

    def _learnt(self, step: int, loss: float) -> None:
        self.row.clear()
        self.in_a_row = 0
        if math.isfinite(loss):
            self.losses.append((step, loss))
        while len(self.losses) >= self.window + LAG:
            self.losses.popleft()

    def _without_update(self, step: int, loss: float, limit: float | None) -> Judged:
        """A step that is not to count; `limit`: it is a spike."""
        action = self.on_nonfinite if limit is None else self.on_spike
        reason: Reason = "non_finite" if limit is None else "spike"
        said = _not_finite(step, loss) if limit is None else _spike(step, loss, limit)
        if action == "stop":
            raise NonFiniteError(
                f"{said}; the weights were left as they were. Set train.on_nonfinite=skip or rollback to go on, or "
                "lower optimizer.lr."
            )
        self.in_a_row += 1
        if self.in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{said}, and the {self.in_a_row - 1} global batches before it made no update either "
                f"(train.max_skips = {self.max_skips}), so leaving batches out does not help. Lower optimizer.lr, or "
                "look at the data."
            )
        if action == "rollback":
            text = f"{said}: back to the last checkpoint, without this global batch"
            raise RollBack(text, [step], reason, loss, limit)
        self.skipped += 1
        self.row.append(step)
        if self.in_a_row == self.max_skips:
            text = f"{said}, like the {self.in_a_row - 1} global batches before it (train.max_skips = {self.max_skips})"
            raise RollBack(f"{text}: back to the last checkpoint, without them", list(self.row), reason, loss, limit)
        return Judged(reason, skipped=True)


def _not_finite(step: int, loss: float) -> str:
    return f"step {step}: loss {loss:g} or its gradient is not finite"


def _spike(step: int, loss: float, limit: float) -> str:
    return f"step {step}: loss {loss:.4f} is a spike (above {limit:.4f})"
