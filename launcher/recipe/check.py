"""`load`: a recipe that may be planned and run, or everything that is wrong with it at once; rules are in `rules/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem, RecipeError
from launcher.recipe import elastic
from launcher.recipe.compose import Composed, draft, in_order
from launcher.recipe.paths import (
    check_data_paths,
    check_mirror,
    check_model_paths,
    check_output_paths,
    check_pod_paths,
    make_absolute,
)
from launcher.recipe.read import shown
from launcher.recipe.rules import architecture, sizes, sources, targets, together
from launcher.recipe.schema import Recipe, check_sections
from launcher.recipe.tree import within

Rule = Callable[[Recipe], Iterator[Problem]]


def load(path: Path | str, overrides: Sequence[str] = (), *, new: bool = True, rules: Sequence[Rule] = ()) -> Composed:
    """A recipe that may be planned and run: composed, checked, its run named, its paths absolute.

    path: a YAML file, or the bare name of a shipped recipe; overrides: `key=value` arguments
    new: False for the recipe in a run directory: LAUNCHER_CLUSTER does not change it again, and its global batch need
        not divide by the ranks there are now (missing slots become rows of weight 0)
    rules: the caller's own, beside those that hold for every recipe
    Raises:
        RecipeError: every problem of composition and every broken rule, each with key, value, fix and place.
    """
    drafted = draft(path, overrides, resolved=not new)
    recipe = drafted.composed.recipe
    if recipe.run.name is None:
        recipe.run.name = drafted.composed.path.stem
    problems = check(drafted.composed, broken=drafted.broken, lost=drafted.lost, new=new, rules=rules)
    if problems := [*drafted.problems, *problems]:
        raise RecipeError(in_order(problems), shown(drafted.composed.path))
    make_absolute(recipe)
    return drafted.composed


def check(
    composed: Composed,
    *,
    broken: Collection[str] = (),
    lost: Collection[str] = (),
    new: bool = True,
    rules: Sequence[Rule] = (),
) -> list[Problem]:
    """Every broken rule, inside a section and between sections; nothing that rests on a key in `broken` or a wrong one.

    broken: keys that hold a stand-in
    lost: keys of which nothing is said if they are not given
    """
    broken = {*broken, *(key for key in (*composed.origins, *lost) if within(key, lost) and not composed.where(key))}
    problems = _news(composed, check_sections(composed.recipe), broken)
    wrong = {*broken, *(problem.key for problem in problems)}
    for rule in (*RULES, *rules):
        if new or rule is not sizes.batch:
            problems += _news(composed, rule(composed.recipe), wrong)
    if not problems and not broken:
        problems += _news(composed, _memory(composed.recipe), ())  # arithmetic on values that all make sense
    return problems


def _news(composed: Composed, problems: Iterable[Problem], broken: Collection[str]) -> list[Problem]:
    """The problems that are no mere consequence of what is broken, with their places."""
    placed = (p if p.where else replace(p, where=composed.where(p.key)) for p in problems)
    return [p for p in placed if not any(within(key, broken) for key in (p.key, *p.because))]


def _memory(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.config is None and (recipe.cluster.gpu_memory_gib is None or recipe.cluster.accelerator == "cpu"):
        return
    from launcher.plan import make_plan, memory_problems
    from launcher.plan.elastic import elastic_problems
    from launcher.plan.saving import saving_problems

    try:
        plan = make_plan(recipe)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        key = "model.config" if recipe.model.config is not None else "model.name"
        value = "{...}" if recipe.model.config is not None else recipe.model.name
        yield Problem(key, value, f"an architecture whose parameters can be counted ({error})")
        return
    yield from memory_problems(recipe, plan)
    yield from saving_problems(recipe, plan)
    yield from elastic_problems(recipe)


RULES: tuple[Rule, ...] = (
    sources.model_source,
    check_model_paths,
    check_data_paths,
    check_output_paths,
    check_mirror,
    check_pod_paths,
    sources.data_sources,
    sources.objective,
    sources.documents,
    sources.stream,
    sources.evaluation,
    sizes.positions,
    sizes.batch,
    sizes.lengths,
    sizes.mesh,
    sizes.groups,
    elastic.shapes,
    sizes.checkpoints,
    sizes.copies,
    sizes.ways_back,
    together.precision,
    together.blocks,
    together.kernels,
    together.adapter,
    architecture.buildable,
    together.deepspeed,
    together.on_the_cpu,
    targets.shared_folder,
    targets.snapshot,
)
