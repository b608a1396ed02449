"""How long a run needs to save itself when it is asked to stop, and whether its time limit leaves that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import Problem
from launcher.plan.disk import checkpoint_bytes
from launcher.recipe.schema import Cluster, Recipe

if TYPE_CHECKING:
    from launcher.plan import Plan

BYTES_PER_S = 10**9  # of one node to the shared file system, on the safe side for large clusters
LEAST_S = 10


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
