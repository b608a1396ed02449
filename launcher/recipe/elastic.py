"""Elastic recipes (`cluster.min_nodes`): the recipe as an attempt with fewer nodes has it, and what it must allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.errors import Problem, show_value
from launcher.recipe.rules import sizes, together
from launcher.recipe.schema import Recipe

_OF_THE_NODES = (sizes.mesh, sizes.groups, together.precision)  # rules that the number of nodes may break


def on_nodes(recipe: Recipe, nodes: int) -> Recipe:
    """The recipe of an attempt on so many nodes; the given one stays as it is."""
    if nodes == recipe.cluster.nodes:
        return recipe
    return replace(recipe, cluster=replace(recipe.cluster, nodes=nodes))


def counts(recipe: Recipe) -> range:
    """The numbers of nodes that an attempt may have, fewest first."""
    most = recipe.cluster.nodes
    return range(recipe.cluster.min_nodes or most, most + 1)


def shapes(recipe: Recipe) -> Iterator[Problem]:
    """With each number of nodes that an attempt may have, the ranks can be laid out as the recipe says."""
    least, most = recipe.cluster.min_nodes, recipe.cluster.nodes
    if least is None or not 1 <= least <= most:
        return
    whole = {problem.key for problem in _broken(recipe)}
    broken = {n: [p for p in _broken(on_nodes(recipe, n)) if p.key not in whole] for n in counts(recipe)}
    bad = [nodes for nodes, problems in broken.items() if problems]
    if not bad:
        return
    nodes, problem = bad[-1], broken[bad[-1]][0]
    said = f"{problem.key} = {show_value(problem.value)} is refused, which has to be {problem.expected}"
    expected = f"a number from which on up to {most} nodes all fit: with {nodes} node{'s' * (nodes > 1)} {said}"
    fix = f"Use {nodes + 1}" if nodes + 1 < most else "Write null"
    because = ("cluster.nodes", "cluster.nproc_per_node", problem.key, *problem.because)
    yield Problem("cluster.min_nodes", least, expected, f"{fix}, or leave {problem.key} out.", because=because)


def _broken(recipe: Recipe) -> list[Problem]:
    return [problem for rule in _OF_THE_NODES for problem in rule(recipe)]
