"""What must hold between the sections of a recipe, and `load`, which says everything that is wrong with one at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem, RecipeError
from launcher.recipe.compose import Composed, draft, in_order
from launcher.recipe.paths import (
    DATA_ENDINGS,
    check_data_paths,
    check_model_paths,
    check_output_paths,
    folder_config,
    looks_like_path,
    make_absolute,
)
from launcher.recipe.read import shown
from launcher.recipe.schema import check_sections
from launcher.recipe.tree import within

_WORLD = ("cluster.nodes", "cluster.nproc_per_node")
_CPU_ATTENTION = ("auto", "sdpa", "eager")  # flex has a forward pass on the CPU, but none backward

Rule = Callable[[Composed], Iterator[Problem]]


def load(path: Path | str, overrides: Sequence[str] = (), *, new: bool = True) -> Composed:
    """A recipe that may be planned and run: composed, checked, its run named, its paths absolute.

    path: a YAML file, or the bare name of a shipped recipe; overrides: `key=value` arguments
    new: False for the recipe in a run directory: LAUNCHER_CLUSTER does not change it again, and its global batch need
        not divide by the ranks there are now (missing slots become rows of weight 0)
    Raises:
        RecipeError: every problem of composition and every broken rule, each with key, value, fix and place.
    """
    drafted = draft(path, overrides, resolved=not new)
    problems = check(drafted.composed, broken=drafted.broken, lost=drafted.lost, new=new)
    if problems := [*drafted.problems, *problems]:
        raise RecipeError(in_order(problems), shown(drafted.composed.path))
    recipe = drafted.composed.recipe
    recipe.run.name = recipe.run.name or drafted.composed.path.stem
    make_absolute(recipe)
    return drafted.composed


def check(
    composed: Composed, *, broken: Collection[str] = (), lost: Collection[str] = (), new: bool = True
) -> list[Problem]:
    """Every broken rule, inside a section and between sections; nothing that rests on a key in `broken` or a wrong one.

    broken: keys that hold a stand-in
    lost: keys of which nothing is said if they are not given
    """
    broken = {*broken, *(key for key in (*composed.origins, *lost) if within(key, lost) and not composed.where(key))}
    problems = _news(composed, check_sections(composed.recipe), broken)
    wrong = {*broken, *(problem.key for problem in problems)}
    for rule in RULES:
        if new or rule is not _batch:
            problems += _news(composed, rule(composed), wrong)
    if not problems and not broken:
        problems += _news(composed, _memory(composed), ())  # arithmetic on values that all make sense
    return problems


def _news(composed: Composed, problems: Iterable[Problem], broken: Collection[str]) -> list[Problem]:
    """The problems that are no mere consequence of what is broken, with their places."""
    placed = (p if p.where else replace(p, where=composed.where(p.key)) for p in problems)
    return [p for p in placed if not any(within(key, broken) for key in (p.key, *p.because))]


def _batch(composed: Composed) -> Iterator[Problem]:
    train, world = composed.recipe.train, _world(composed)
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


def _mesh(composed: Composed) -> Iterator[Problem]:
    strategy, world = composed.recipe.strategy, _world(composed)
    if world < 1:
        return
    cluster = composed.recipe.cluster
    size = f"the world size {world} ({cluster.nodes} node{'s' if cluster.nodes > 1 else ''} x {cluster.nproc_per_node})"
    replicate, shard = strategy.replicate, strategy.shard
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
        fix = f"Use {_nearest_divisors(value, world)}."
        yield Problem(f"strategy.{key}", value, f"a divisor of {size}", fix, because=("strategy.kind", *_WORLD))
    if not odd and replicate and shard and replicate * shard != world:
        yield Problem(
            "strategy.replicate", replicate, f"{world // shard}, so that replicate x shard is {size}",
            f"Write {world // shard}, or leave one of the two out.",
            because=("strategy.kind", "strategy.shard", *_WORLD),
        )  # fmt: skip


def _lengths(composed: Composed) -> Iterator[Problem]:
    train, optimizer = composed.recipe.train, composed.recipe.optimizer
    if train.max_steps is not None and optimizer.warmup_steps is not None and optimizer.warmup_steps > train.max_steps:
        fix = f"Write at most {train.max_steps}, or warmup_ratio=0.03."
        allowed = f"train.max_steps = {train.max_steps} steps or fewer"
        yield Problem(
            "optimizer.warmup_steps", optimizer.warmup_steps, allowed, fix, because=("train.max_steps",)
        )  # fmt: skip


def _positions(composed: Composed) -> Iterator[Problem]:
    model, seq_len = composed.recipe.model, composed.recipe.data.seq_len
    config = model.config or folder_config(model.name) or {}
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(longest, int) and seq_len > longest:
        allowed = f"at most the {longest} positions of the model"
        yield Problem("data.seq_len", seq_len, allowed, f"Write {longest}.", because=("model.name", "model.config"))


def _evaluation(composed: Composed) -> Iterator[Problem]:
    data, every = composed.recipe.data, composed.recipe.train.eval_every_steps
    if every is not None and not data.eval and not data.eval_fraction:
        yield Problem(
            "train.eval_every_steps",
            every,
            "null, because there are no evaluation data",
            "Give data.eval or data.eval_fraction.",
            because=("data.eval", "data.eval_fraction"),
        )


def _checkpoints(composed: Composed) -> Iterator[Problem]:
    checkpoint = composed.recipe.checkpoint
    every, keep = checkpoint.every_steps, checkpoint.keep_every_steps
    if every and keep and keep > 0 and keep % every and checkpoint.every_minutes is None:
        near = max(1, round(keep / every)) * every
        yield Problem(
            "checkpoint.keep_every_steps", keep, f"a multiple of checkpoint.every_steps = {every}",
            f"Nearest: {near}.", because=("checkpoint.every_steps", "checkpoint.every_minutes"),
        )  # fmt: skip


def _objective(composed: Composed) -> Iterator[Problem]:
    data = composed.recipe.data
    if composed.recipe.objective.kind == "pretrain" and data.train_on == "last_assistant":
        fix = "Write all, or remove the key."
        yield Problem("data.train_on", data.train_on, "all, because pretrain learns every token", fix)


def _sources(composed: Composed) -> Iterator[Problem]:
    for key, sources in (("train", composed.recipe.data.train), ("eval", composed.recipe.data.eval)):
        for i, source in enumerate(sources):
            if source.tags and source.format not in ("auto", "sharegpt", "messages"):
                yield Problem(
                    f"data.{key}.{i}.tags",
                    source.tags,
                    f"null with format {source.format}, which has no tags",
                    "Remove the key.",
                )
            for name in ("split", "subset"):
                if getattr(source, name) is not None and source.path.endswith(DATA_ENDINGS):
                    value = getattr(source, name)
                    yield Problem(
                        f"data.{key}.{i}.{name}",
                        value,
                        f"null: only a hub dataset has a {name}, this is a file",
                        "Remove the key.",
                    )


def _model_source(composed: Composed) -> Iterator[Problem]:
    model = composed.recipe.model
    if model.revision is None or (model.name is None and model.config is None):
        return
    if model.name is None or looks_like_path(model.name):
        what = "a folder" if model.name else "model.config"
        yield Problem(
            "model.revision",
            model.revision,
            f"null with {what}: only a hub model has revisions",
            "Remove the key.",
            because=("model.name", "model.config"),
        )


def _device(composed: Composed) -> Iterator[Problem]:
    model, cluster, train = composed.recipe.model, composed.recipe.cluster, composed.recipe.train
    if model.dtype == "bf16" and train.precision == "fp16":
        fix = "Write auto, or model.dtype=fp32."
        yield Problem("train.precision", "fp16", "auto or bf16 with model.dtype = bf16", fix)
    if cluster.accelerator != "cpu":
        return
    if train.precision == "fp16":
        yield Problem("train.precision", "fp16", "auto, fp32 or bf16 on the CPU", "Write auto.")
    if model.liger is True:
        yield Problem("model.liger", True, "auto or false on the CPU, its kernels need a GPU", "Write auto.")
    if model.attention not in _CPU_ATTENTION:
        allowed = "auto, sdpa or eager on the CPU (cluster.accelerator = cpu), the others train on a GPU alone"
        yield Problem("model.attention", model.attention, allowed, "Write auto.")
    if cluster.gpu_memory_gib is not None:
        fix = "Remove the key."
        yield Problem("cluster.gpu_memory_gib", cluster.gpu_memory_gib, "null with cluster.accelerator = cpu", fix)


def _memory(composed: Composed) -> Iterator[Problem]:
    recipe = composed.recipe
    if recipe.model.config is None and (recipe.cluster.gpu_memory_gib is None or recipe.cluster.accelerator == "cpu"):
        return
    from launcher.plan import make_plan, memory_problems

    try:
        plan = make_plan(recipe)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        key = "model.config" if recipe.model.config is not None else "model.name"
        value = "{...}" if recipe.model.config is not None else recipe.model.name
        yield Problem(key, value, f"an architecture that adds up ({type(error).__name__}: {error})")
        return
    yield from memory_problems(recipe, plan)


RULES: tuple[Rule, ...] = (
    _model_source,
    lambda composed: check_model_paths(composed.recipe),
    lambda composed: check_data_paths(composed.recipe),
    lambda composed: check_output_paths(composed.recipe),
    _sources,
    _objective,
    _positions,
    _batch,
    _evaluation,
    _lengths,
    _mesh,
    _checkpoints,
    _device,
)


def _world(composed: Composed) -> int:
    return composed.recipe.cluster.nodes * composed.recipe.cluster.nproc_per_node


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
