"""How long a run needs to save itself when it is asked to stop, whether its time limit leaves that, and how often a
checkpoint pays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import Problem
from launcher.plan.disk import checkpoint_bytes
from launcher.recipe.schema import Cluster, Recipe

if TYPE_CHECKING:
    from launcher.plan import Plan

BYTES_PER_S = 10**9  # of one node to the shared file system, on the safe side for large clusters
COPY_BYTES_PER_S = 4 * 10**9  # of one node into the kept host buffers
LEAST_S = 10
MOST_SHARE = 0.05  # of the time that saves may take, however often a run fails
LEAST_COST_S = 0.001


def stop_lead_s(cluster: Cluster) -> int:
    """Seconds before the time limit at which a run is asked to stop; a preempted one is given as long."""
    if cluster.stop_lead_s is not None:
        return cluster.stop_lead_s
    return 300 if cluster.time_limit_min is None else min(300, cluster.time_limit_min * 6)


def save_s(node_bytes: float = 0) -> int:
    """Seconds that a node needs to write its share of a checkpoint; never less than 10, for the step before it."""
    return max(LEAST_S, math.ceil(node_bytes / BYTES_PER_S))


def time_problem(cluster: Cluster, save: int) -> Problem | None:
    """What is wrong with a time limit that is over before a run could be asked to stop and save itself.

    save: seconds, as of `save_s`
    """
    limit, lead = cluster.time_limit_min, stop_lead_s(cluster)
    if limit is None or limit * 60 > lead + save:
        return None
    expected = f"more than the {lead} s of cluster.stop_lead_s and the {save} s that a checkpoint takes"
    fix = f"Use at least {(lead + save) // 60 + 1}" + (", or a smaller stop_lead_s." if lead > save else ".")
    return Problem("cluster.time_limit_min", limit, expected, fix, because=("cluster.stop_lead_s",))


def saving_problems(recipe: Recipe, plan: Plan) -> Iterator[Problem]:
    """Time for this model's checkpoint: inside the time limit, and between the request to stop and the limit."""
    cluster, parameters = recipe.cluster, plan.parameters
    if cluster.time_limit_min is None or parameters is None:
        return
    size = checkpoint_bytes(recipe, parameters) / plan.nodes
    save = save_s(size)
    if (problem := time_problem(cluster, save)) is not None:
        yield problem
    elif (lead := stop_lead_s(cluster)) < save and save > LEAST_S:
        expected = f"{save} s or more, in which each node writes its {size / 2**30:.0f} GiB at 1 GB/s"
        because = ("cluster.time_limit_min",)
        yield Problem("cluster.stop_lead_s", lead, expected, f"Use {save}, or more nodes.", because=because)


@dataclass(frozen=True, slots=True)
class SaveCost:
    """What a checkpoint costs, in seconds: how long training stands still for it, how long until it is durable."""

    blocked_s: float
    durable_s: float


@dataclass(frozen=True, slots=True)
class Interval:
    """How often to save, in seconds of training, and what decided it."""

    seconds: float
    reason: str


def best_interval(cost: SaveCost, *, mttf_s: float, lead_s: float, step_s: float | None = None) -> Interval:
    """The time between two saves at which least work is lost: to saves, and to failures every `mttf_s`.

    Bounded below, so that saves take at most `MOST_SHARE` of the time and one is durable before the next begins; and
    above by the time between failures, and by `lead_s` where a save that is asked for may not be done within that.

    Args:
        lead_s: between the request to stop and the end
        step_s: of an optimizer step; None: not known

    Reference: Young 1974 (doi:10.1145/361147.361115), Daly 2006 (doi:10.1016/j.future.2004.11.016), equation 37.
    """
    blocked = max(cost.blocked_s, LEAST_COST_S)
    chosen = Interval(_daly(blocked, mttf_s), f"the optimum of Young and Daly for {_told(blocked)} a save")
    if chosen.seconds >= mttf_s:
        chosen = Interval(mttf_s, "no more than the time between failures")
    if 2 * cost.durable_s + (step_s or 0) > lead_s and chosen.seconds > lead_s:  # one may be in flight when it is asked
        why = f"no more, because a save, {_told(cost.durable_s)} until durable, may not be done within stop_lead_s"
        chosen = Interval(lead_s, why)
    bounds = {
        f"no less, so that saves take at most {MOST_SHARE:.0%} of the time": blocked / MOST_SHARE,
        "no less, because one save must be durable before the next begins": cost.durable_s,
        "no less than a step": step_s or 0,
    }
    why, least = max(bounds.items(), key=lambda item: item[1])
    return Interval(least, why) if least > chosen.seconds else chosen


def lost_s(interval_s: float, cost: SaveCost) -> float:
    """Seconds of training that a failure is expected to cost: half an interval, and what was not durable yet."""
    return interval_s / 2 + cost.durable_s


def useful_share(interval_s: float, cost: SaveCost, *, mttf_s: float, restart_s: float = 0) -> float:
    """Share of the time that is training which counts (ETTR): the rest are saves, lost work and restarts."""
    lost = (lost_s(interval_s, cost) + restart_s) / mttf_s
    return max(0.0, (1 - cost.blocked_s / (interval_s + cost.blocked_s)) * (1 - lost))


def estimated_cost(recipe: Recipe, plan: Plan) -> SaveCost | None:
    """What a checkpoint will cost by arithmetic; None where no formula knows the model."""
    if plan.parameters is None:
        return None
    node_bytes = checkpoint_bytes(recipe, plan.parameters) / plan.nodes
    durable = node_bytes / BYTES_PER_S
    return SaveCost(node_bytes / COPY_BYTES_PER_S if recipe.checkpoint.async_save else durable, durable)


def _daly(cost_s: float, mttf_s: float) -> float:
    if cost_s >= 2 * mttf_s:
        return mttf_s
    x = cost_s / (2 * mttf_s)
    return math.sqrt(2 * cost_s * mttf_s) * (1 + math.sqrt(x) / 3 + x / 9) - cost_s


def _told(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
