"""Whether a plan fits the GPU, and if not, the cheapest change of the recipe that makes it fit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, show_value
from launcher.plan.memory import GIB, Memory, estimate
from launcher.plan.mesh import make_mesh, world_size
from launcher.plan.parameters import Config, Weight
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from launcher.plan import Plan

PARTS = ("weights", "masters", "gradients", "moments", "gathered", "buffers", "activations", "logits", "update")


@dataclass(frozen=True, slots=True)
class Change:
    """Keys of a recipe and their new values.

    price: how dear it is beside others; a sum of prices ranks combinations
    cost: what it costs, for people
    """

    keys: tuple[tuple[str, Any], ...] = ()
    price: int = 0
    cost: str = ""

    def __str__(self) -> str:
        return " ".join(f"{key}={show_value(value)}" for key, value in self.keys)


def memory_problems(recipe: Recipe, plan: Plan) -> Iterator[Problem]:
    """Complaint of a plan whose peak is larger than a GPU, with the cheapest change that fits.

    Nothing is said where `cluster.gpu_memory_gib` is null, or no formula knows the architecture.
    """
    from launcher.plan import architecture

    limit = recipe.cluster.gpu_memory_gib
    if limit is None or plan.memory is None or plan.memory.total <= limit * GIB:
        return
    known = architecture(recipe)
    assert known is not None, "a plan with memory has an architecture"
    need = f"at least {gib(plan.memory.total)} on each rank: {split(plan.memory)}"
    yield Problem("cluster.gpu_memory_gib", limit, need, _advice(recipe, *known, limit=limit))


def split(memory: Memory) -> str:
    """The parts of a peak that are not nothing, the largest first."""
    parts = {part: getattr(memory, part) for part in (*PARTS, "context")}
    shown = sorted((item for item in parts.items() if item[1] >= GIB / 100), key=lambda item: -item[1])
    return ", ".join(f"{part} {value / GIB:.2f}" for part, value in shown or parts.items())


def gib(count: int, *, within: float = math.inf) -> str:
    """Bytes as `73.1 GiB`, rounded up so that it suffices; with more digits where it must not exceed `within`."""
    shown, digits = _rounded_up(count, 1), 1
    while shown > within and digits < 6:
        digits += 1
        shown = _rounded_up(count, digits)
    return f"{shown:.{digits}f} GiB"


def _rounded_up(count: int, digits: int) -> float:
    return -(-count * 10**digits // GIB) / 10**digits


def cheapest(recipe: Recipe, config: Config, found: list[Weight], *, limit: float) -> tuple[Change, Memory, bool]:
    """(change, memory with it, whether it fits): the first that fits in order of price, else the smallest."""
    smallest: tuple[Change, Memory] | None = None
    for change in combinations(recipe):
        memory = _with(recipe, change, config, found)
        if memory is None:
            continue
        if memory.total <= limit * GIB:
            return change, memory, True
        if smallest is None or memory.total < smallest[1].total:
            smallest = change, memory
    assert smallest is not None, "offering no change at all is one combination"
    return *smallest, False


def combinations(recipe: Recipe) -> Iterator[Change]:
    """Every combination of at most one change of each sort, the cheapest first."""
    sorts = (_rows(recipe), _recomputation(recipe), _sharding(recipe), _offload(recipe), _nodes(recipe))
    found = []
    for chosen in itertools.product(*([Change(), *changes] for changes in sorts)):
        keys = tuple(pair for change in chosen for pair in change.keys)
        if len(dict(keys)) == len(keys):
            costs = [change.cost for change in chosen if change.keys]
            found.append(Change(keys, sum(change.price for change in chosen), "; ".join(costs)))
    return iter(sorted(found, key=lambda change: change.price))


def applied(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with a change; the given one stays as it is."""
    changed = copy.deepcopy(recipe)
    for key, value in change.keys:
        *path, last = key.split(".")
        section: Any = changed
        for name in path:
            section = getattr(section, name)
        setattr(section, last, value)
    return changed


def _advice(recipe: Recipe, config: Config, found: list[Weight], *, limit: float) -> str:
    change, memory, fits = cheapest(recipe, config, found, limit=limit)
    if fits:
        return f"Cheapest change that fits, {gib(memory.total, within=limit)}: {change} ({change.cost})."
    least = f"the least is {gib(memory.total)}" + (f", with {change}" if change.keys else ", as it is")
    return f"No change of batch, recomputation, sharding, offload or nodes fits: {least}."


def _with(recipe: Recipe, change: Change, config: Config, found: list[Weight]) -> Memory | None:
    """Memory after a change; None where its numbers do not divide, or its keys do not go together."""
    changed = applied(recipe, change)
    if change.keys and not _stands(changed):
        return None
    return estimate(changed, config, found, make_mesh(changed))


def _stands(recipe: Recipe) -> bool:
    """Whether the rules of a recipe that the changes could break still hold; `tests/plan/test_fit.py` asks them all."""
    train, strategy, model, world = recipe.train, recipe.strategy, recipe.model, world_size(recipe)
    mesh, group, zero = make_mesh(recipe), strategy.reshard_after_forward, strategy.kind.startswith("zero")
    return (
        train.global_batch_size % (train.micro_batch_size * world) == 0
        and mesh.replicate * mesh.shard == world
        and (isinstance(group, bool) or mesh.shard % group == 0)
        and not (zero and model.dtype == "bf16" and strategy.offload.optimizer != "none")
    )


def _rows(recipe: Recipe) -> list[Change]:
    micro = recipe.train.micro_batch_size
    smaller = [size for size in range(micro - 1, 0, -1) if micro % size == 0]
    cost = "more and smaller forward passes, the same result"
    return [Change((("train.micro_batch_size", size),), 1 + i, cost) for i, size in enumerate(smaller)]


def _recomputation(recipe: Recipe) -> list[Change]:
    modes = ("none", "selective", "full", "offload")
    costs = {
        "selective": (2, "cheap operations are computed twice"),
        "full": (6, "a third more computing"),
        "offload": (9, "a third more computing, and host memory"),
    }
    later = modes[modes.index(recipe.model.gradient_checkpointing) + 1 :]
    return [Change((("model.gradient_checkpointing", mode),), *costs[mode]) for mode in later]


def _sharding(recipe: Recipe) -> list[Change]:
    """Further apart: more of the state on other ranks, for more traffic."""
    strategy, world = recipe.strategy, world_size(recipe)
    if world == 1:
        return []
    if strategy.kind == "ddp":
        return [Change(_to_fsdp2(recipe), 4, "weights travel too, half as much traffic again")]
    if strategy.kind != "fsdp2":
        further = {"zero1": ("zero2", "zero3"), "zero2": ("zero3",), "zero3": ()}[strategy.kind]
        costs = {"zero2": (3, "gradients are reduced after each forward pass"), "zero3": (5, "weights travel too")}
        unset = (("strategy.zero.allgather_bucket_size", None),)
        dropped = unset if strategy.zero.allgather_bucket_size is not None else ()
        return [
            Change((("strategy.kind", to), *(dropped if to == "zero3" else ())), *costs[to]) for to in further
        ]  # fmt: skip
    keys: list[tuple[tuple[str, Any], ...]] = []
    if strategy.reshard_after_forward is not True:
        keys.append((("strategy.reshard_after_forward", True),))
    if make_mesh(recipe).replicate > 1:
        spread = tuple(
            (f"strategy.{key}", None) for key in ("replicate", "shard") if getattr(strategy, key) is not None
        )
        keys += [spread, *((*first, *spread) for first in keys[:1])]
    return [Change(pairs, 3 + i, "more traffic between ranks") for i, pairs in enumerate(keys)]


def _to_fsdp2(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    axes = [key for key in ("replicate", "shard") if getattr(recipe.strategy, key) is not None]
    return (("strategy.kind", "fsdp2"), *((f"strategy.{key}", None) for key in axes))


def _offload(recipe: Recipe) -> list[Change]:
    """State to host memory; ddp has to become fsdp2 for it, which does so also on one rank."""
    strategy = recipe.strategy
    offload = strategy.offload
    optimizer, params = ("strategy.offload.optimizer", "cpu"), ("strategy.offload.params", "cpu")
    slow = "slower steps, and host memory"
    if strategy.kind in ("ddp", "fsdp2"):
        if offload.params != "none":
            return []
        return [Change((*(_to_fsdp2(recipe) if strategy.kind == "ddp" else ()), optimizer, params), 20, slow)]
    changes = []
    if offload.optimizer == "none":
        changes.append(Change((optimizer,), 15, slow))
    if strategy.kind == "zero3" and offload.params == "none":
        changes.append(Change((*((optimizer,) if offload.optimizer == "none" else ()), params), 20, slow))
    return changes


def _nodes(recipe: Recipe) -> list[Change]:
    nodes = recipe.cluster.nodes
    return [
        Change((("cluster.nodes", nodes * times),), 30 + 2 * times, f"{times} times the machines")
        for times in (2, 4, 8, 16)
    ]  # fmt: skip
