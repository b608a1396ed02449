"""Which ranks are slow, from the paces of all: robust against single slow steps, so it names late but seldom wrongly.

Paces are compared by groups of steps that all ranks have done. A rank is slow where it was in all of the last groups,
or in all but one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.run.heartbeat import GROUP, Pace

GROUPS = 5  # that are looked at, within 50 steps
Kind = Literal["computing", "data"]


@dataclass(frozen=True, slots=True)
class Straggler:
    """A slow rank.

    kind: it computes longer than others, or waits longer for its rows
    factor: how many times as long as the median rank; for data, how many times as long the step is for it
    own_s, median_s: its figure and that of the median rank: seconds a position, for data seconds a step
    first_step, last_step: what was looked at
    """

    rank: int
    kind: Kind
    factor: float
    own_s: float
    median_s: float
    first_step: int
    last_step: int


def stragglers(paces: Mapping[int, Mapping[int, Pace]], factor: float) -> list[Straggler]:
    """The slow ranks by what each rank's last groups of steps were like.

    Args:
        paces: by rank, then by group
        factor: above it a rank is slow
    """
    common = set.intersection(*(set(groups) for groups in paces.values())) if len(paces) > 1 else set()
    groups = sorted(common)[-GROUPS:]
    if len(groups) < GROUPS:
        return []
    steps = (groups[0] * GROUP, (groups[-1] + 1) * GROUP)
    found = []
    for rank, own in paces.items():
        for kind, measure in (("computing", _computing), ("data", _waiting)):
            seen = [measure(own[group], [other[group] for other in paces.values()]) for group in groups]
            ratios, owns, medians = zip(*seen, strict=True)
            own_s, median_s, ratio = statistics.median(owns), statistics.median(medians), statistics.median(ratios)
            if sorted(ratios)[1] >= factor and (kind == "data" or own_s >= factor * median_s):
                found.append(Straggler(rank, kind, ratio, own_s, median_s, *steps))  # type: ignore[arg-type]
    return found


def _computing(own: Pace, all_ranks: list[Pace]) -> tuple[float, float, float]:
    """(times as long as the median rank, own, median); of two ranks the faster one is the median."""
    median = statistics.median_low(pace.own_s for pace in all_ranks)
    return (own.own_s / median if median > 0 else 1.0), own.own_s, median


def _waiting(own: Pace, all_ranks: list[Pace]) -> tuple[float, float, float]:
    """(times as long as the step would be without this rank's further waiting, own, median)."""
    median = statistics.median_low(pace.wait_s for pace in all_ranks)
    further, wall = max(0.0, own.wait_s - median), min(pace.wall_s for pace in all_ranks)
    return wall / max(wall - further, 0.01 * wall) if wall > 0 else 1.0, own.wait_s, median
