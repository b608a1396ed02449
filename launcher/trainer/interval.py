"""`checkpoint.every_steps: auto`: how long after a save the next one is due, from what saves and steps are measured to
cost. Rank 0 alone decides; what it wishes travels with the step's one reduction."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from launcher.plan.saving import Interval, SaveCost, best_interval

UNKNOWN_S = 60.0  # until the first save of a run that has not rehearsed one, which is then the measurement
_STEPS = 64  # whose median is the time of a step, however long some stood still for a save or an evaluation
_SAVES = 5  # of whose costs the median counts
_SAID = 0.1  # relative change of the interval that is worth a line


class SaveInterval:
    """The time between saves of a run.

    Args:
        mttf_s: seconds between two failures of the whole job
        lead_s: seconds between a request to stop and the end
        cost: what a save was measured to cost before this attempt; None: nothing is known
    """

    def __init__(self, *, mttf_s: float, lead_s: float, cost: SaveCost | None) -> None:
        self._mttf_s, self._lead_s = mttf_s, lead_s
        self._costs: deque[SaveCost] = deque(maxlen=_SAVES)
        self._before = cost
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._stepped: float | None = None
        self._said: float | None = None
        self.chosen: Interval | None = None
        self.decide()

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, None before the second."""
        return statistics.median(self._steps) if self._steps else None

    def due(self, now: float, *, since: float) -> bool:
        """Whether a save is due; called once a step, which it takes the time of.

        Args:
            since: when the last one began
        """
        if self._stepped is not None:
            self._steps.append(now - self._stepped)
            if len(self._steps) in (2, _STEPS // 4):  # from here on it can be said in steps
                self.decide()
        self._stepped = now
        return now - since >= (UNKNOWN_S if self.chosen is None else self.chosen.seconds)

    def measured(self, *, blocked_s: float, durable_s: float) -> None:
        """Count what a save has cost."""
        self._costs.append(SaveCost(blocked_s, durable_s))
        self.decide()

    def decide(self) -> None:
        """Choose anew from what is known; a change that matters is said, with its reason."""
        cost = self._before
        if self._costs:
            blocked, durable = ([getattr(c, name) for c in self._costs] for name in ("blocked_s", "durable_s"))
            cost = SaveCost(statistics.median(blocked), statistics.median(durable))
        if cost is None:
            return
        self.chosen = best_interval(cost, mttf_s=self._mttf_s, lead_s=self._lead_s, step_s=self.step_s)
        seconds = self.chosen.seconds
        if self.step_s is None or (self._said and abs(seconds - self._said) <= _SAID * self._said):
            return
        steps = self._in_steps()
        was = f" (was {self._said:.3g} s)" if self._said else ""
        print(f"checkpoints: every {seconds:.3g} s, about {steps} steps{was}: {self.chosen.reason}", flush=True)
        self._said = seconds

    def told(self) -> dict[str, Any] | None:
        """What state.json says of it; None before it is known."""
        if self.chosen is None:
            return None
        return {"seconds": self.chosen.seconds, "steps": self._in_steps(), "reason": self.chosen.reason}

    def _in_steps(self) -> int | None:
        return max(1, round(self.chosen.seconds / self.step_s)) if self.chosen and self.step_s else None
