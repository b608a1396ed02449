"""Numbers that must divide or fit one another: batch, mesh, groups of ranks, lengths, checkpoints, copies."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.errors import Problem
from launcher.recipe.paths import folder_config
from launcher.recipe.schema import Recipe

_WORLD = ("cluster.nodes", "cluster.nproc_per_node")


def batch(recipe: Recipe) -> Iterator[Problem]:
    """The global batch is made of whole forwards of every rank."""
    train, world = recipe.train, _world(recipe)
    portion = world * train.micro_batch_size
    if portion < 1 or train.global_batch_size < 1 or train.global_batch_size % portion == 0:
        return
    allowed = f"a multiple of {portion} ({_rows(train.micro_batch_size)} x {world} rank{'s' if world > 1 else ''})"
    near = max(1, round(train.global_batch_size / portion)) * portion
    fix = f"Nearest: {near}."
    if train.global_batch_size % world == 0:
        fits = max(size for size in _divisors(train.global_batch_size // world) if size <= train.micro_batch_size)
        fix = f"Nearest: {near}; or train.micro_batch_size={fits}."
    because = ("train.micro_batch_size", *_WORLD)
    yield Problem("train.global_batch_size", train.global_batch_size, allowed, fix, because=because)


def mesh(recipe: Recipe) -> Iterator[Problem]:
    """Copies x ranks that share one are all ranks."""
    strategy, world = recipe.strategy, _world(recipe)
    if world < 1 or strategy.kind not in ("ddp", "fsdp2"):
        return
    size, replicate, shard = _all_ranks(recipe), strategy.replicate, strategy.shard
    if strategy.kind == "ddp":
        if replicate not in (None, world):
            yield Problem(
                "strategy.replicate", replicate, f"null or {size} with ddp", "Remove the key.", because=_WORLD
            )
        return
    odd = [
        (key, value)
        for key, value in (("shard", shard), ("replicate", replicate))
        if value is not None and value > 0 and world % value
    ]
    for key, value in odd:
        other = replicate if key == "shard" else shard  # where it fits, it leaves one number for this axis
        fits = world // other if other and other > 0 and world % other == 0 else _nearest_divisors(value, world)
        because = ("strategy.kind", *_WORLD)
        yield Problem(f"strategy.{key}", value, f"a divisor of {size}", f"Use {fits}.", because=because)
    if not odd and replicate and shard and replicate * shard != world:
        yield Problem(
            "strategy.replicate", replicate, f"{world // shard}, so that replicate x shard is {size}",
            f"Write {world // shard}, or leave one of the two out.",
            because=("strategy.kind", "strategy.shard", *_WORLD),
        )  # fmt: skip


def groups(recipe: Recipe) -> Iterator[Problem]:
    """Groups of ranks that hold a second copy of weights: whole ones, that do not straddle nodes."""
    strategy, world, per_node = recipe.strategy, _world(recipe), recipe.cluster.nproc_per_node
    if world < 1 or per_node < 1:
        return
    again, size = strategy.reshard_after_forward, strategy.zero.hpz_partition_size
    if strategy.kind == "fsdp2" and not isinstance(again, bool) and again > 1:
        shard = strategy.shard or world // (strategy.replicate or 1)
        if shard < 1 or shard % again:
            fix = f"Use {_nearest_divisors(again, max(shard, 1))}, or true."
            because = ("strategy.kind", "strategy.shard", "strategy.replicate", *_WORLD)
            expected = f"a divisor of the {shard} ranks that share a copy"
            yield Problem("strategy.reshard_after_forward", again, expected, fix, because=because)
    if strategy.kind == "zero3" and size > 1 and (world % size or (per_node % size and size % per_node)):
        fix = f"Use {per_node}, the ranks of a node." if per_node > 1 else "Use 1, which means no second copy."
        expected = f"a divisor of {_all_ranks(recipe)} that does not straddle nodes"
        yield Problem("strategy.zero.hpz_partition_size", size, expected, fix, because=("strategy.kind", *_WORLD))


def lengths(recipe: Recipe) -> Iterator[Problem]:
    """The warm-up ends before the schedule does."""
    optimizer = recipe.optimizer
    key, steps = "optimizer.schedule_steps", optimizer.schedule_steps
    if steps is None:
        key, steps = "train.max_steps", recipe.train.max_steps
    if steps is not None and optimizer.warmup_steps is not None and optimizer.warmup_steps > steps:
        fix = f"Write at most {steps}, or warmup_ratio=0.03."
        yield Problem(
            "optimizer.warmup_steps", optimizer.warmup_steps, f"{key} = {steps} steps or fewer", fix, because=(key,)
        )


def positions(recipe: Recipe) -> Iterator[Problem]:
    """Rows are no longer than the positions a model knows."""
    model, seq_len = recipe.model, recipe.data.seq_len
    config = model.config or folder_config(model.name) or {}
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(longest, int) and seq_len > longest:
        allowed = f"at most the {longest} positions of the model"
        yield Problem("data.seq_len", seq_len, allowed, f"Write {longest}.", because=("model.name", "model.config"))


def checkpoints(recipe: Recipe) -> Iterator[Problem]:
    """What is kept is written."""
    checkpoint = recipe.checkpoint
    every, keep = checkpoint.every_steps, checkpoint.keep_every_steps
    if isinstance(every, int) and every > 0 and keep and keep > 0 and keep % every and checkpoint.every_minutes is None:
        near = max(1, round(keep / every)) * every
        yield Problem(
            "checkpoint.keep_every_steps", keep, f"a multiple of checkpoint.every_steps = {every}",
            f"Nearest: {near}.", because=("checkpoint.every_steps", "checkpoint.every_minutes"),
        )  # fmt: skip


def copies(recipe: Recipe) -> Iterator[Problem]:
    """Ranks that hold nothing in common have nothing to compare."""
    every, strategy, world = recipe.train.replica_check_steps, recipe.strategy, _world(recipe)
    if every is None or world < 1:
        return
    shard = strategy.shard or world // (strategy.replicate or 1)
    if world == 1:
        why = "on one rank"
    elif strategy.kind == "zero3":
        why = "with zero3, which keeps each weight on one rank alone"
    elif strategy.kind == "fsdp2" and shard >= world:
        why = f"with fsdp2 over {_all_ranks(recipe)}, which keeps each weight on one rank alone"
    else:
        return
    fix = "Remove the key" + (", or set strategy.replicate=2 or more." if strategy.kind == "fsdp2" else ".")
    because = ("strategy.kind", "strategy.shard", "strategy.replicate", *_WORLD)
    yield Problem("train.replica_check_steps", every, f"null {why}", fix, because=because)


def ways_back(recipe: Recipe) -> Iterator[Problem]:
    """A run that is to go back has a checkpoint to go back to."""
    checkpoint = recipe.checkpoint
    if checkpoint.every_steps is not None or checkpoint.every_minutes is not None:
        return
    for key in ("on_nonfinite", "on_spike"):
        if getattr(recipe.train, key) == "rollback":
            yield Problem(
                f"train.{key}", "rollback", "checkpoints to go back to: without them every rollback is to step 0",
                "Set checkpoint.every_steps, e.g. 500.", because=("checkpoint.every_steps", "checkpoint.every_minutes"),
            )  # fmt: skip


def _world(recipe: Recipe) -> int:
    return recipe.cluster.nodes * recipe.cluster.nproc_per_node


def _all_ranks(recipe: Recipe) -> str:
    nodes, per_node = recipe.cluster.nodes, recipe.cluster.nproc_per_node
    return f"the world size {nodes * per_node} ({nodes} node{'s' if nodes > 1 else ''} x {per_node})"


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def _nearest_divisors(value: int, world: int) -> str:
    """The divisors next to `value`, below and above."""
    divisors = _divisors(world)
    below, above = [n for n in divisors if n < value], [n for n in divisors if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
