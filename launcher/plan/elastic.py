"""The plans of an elastic run, one for each number of nodes an attempt may have, and whether the fewest suffice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import Problem
from launcher.plan.batch import empty_slots
from launcher.plan.fit import gib
from launcher.plan.memory import GIB, estimate
from launcher.plan.mesh import make_mesh
from launcher.plan.saving import saving_problems
from launcher.recipe.elastic import counts, on_nodes
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from launcher.plan import Plan


def plans(recipe: Recipe) -> list[Plan]:
    """The plan of each number of nodes, fewest first; one alone where the recipe is not elastic."""
    from launcher.plan import make_plan

    return [make_plan(on_nodes(recipe, nodes)) for nodes in counts(recipe)]


def empty(plan: Plan) -> int:
    """Rows of weight 0 in each step of a plan, without effect on what is learnt."""
    return empty_slots(
        global_batch_size=plan.global_batch_size, micro_batch_size=plan.micro_batch_size, world_size=plan.world_size
    )


def elastic_problems(recipe: Recipe) -> Iterator[Problem]:
    """Memory and time for a checkpoint on the fewest nodes; what is wrong with all nodes is said elsewhere."""
    from launcher.plan import architecture, make_plan

    least, most, limit = recipe.cluster.min_nodes, recipe.cluster.nodes, recipe.cluster.gpu_memory_gib
    known = architecture(recipe)
    if least is None or least == most or known is None:
        return
    need = {n: estimate(on_nodes(recipe, n), *known, make_mesh(on_nodes(recipe, n))).total for n in counts(recipe)}
    if limit is not None and need[most] <= limit * GIB < need[least]:
        fits = min(nodes for nodes in need if all(need[n] <= limit * GIB for n in range(nodes, most + 1)))
        expected = f"{fits} or more: on {least} a rank needs {gib(need[least])} of the {limit:g} GiB of its GPU"
        because = ("cluster.gpu_memory_gib",)
        yield Problem("cluster.min_nodes", least, expected, f"Use {fits if fits < most else 'null'}.", because=because)
        return
    fewest = on_nodes(recipe, least)
    if not list(saving_problems(recipe, make_plan(recipe))):
        for problem in saving_problems(fewest, make_plan(fewest)):
            expected = f"{problem.expected}, where only the {least} of cluster.min_nodes are left"
            yield Problem(problem.key, problem.value, expected, problem.fix, because=("cluster.min_nodes",))
