"""Opening a run: making its directory, or going on with the one that is there after listing what changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from math import isclose
from pathlib import Path

from launcher.errors import UserError
from launcher.jobs.changes import LENGTH, PLACE, VERSIONS, Change, changes, identity
from launcher.jobs.contents import changed_contents, remember
from launcher.jobs.preparation import agrees, total_steps
from launcher.plan import Plan
from launcher.plan.batch import empty_slots
from launcher.plan.schedule import jump, learning_rate
from launcher.recipe.check import Rule, load
from launcher.recipe.schema import Optimizer, Recipe, to_dict
from launcher.run.data import require_current
from launcher.run.directory import RunDirectory
from launcher.run.files import read_json
from launcher.run.lease import Lease, Submission, hold_lease
from launcher.run.ledger import (
    CheckpointRef,
    latest_attempt,
    lost_beginnings,
    missing_checkpoints,
    record_changes,
    valid_checkpoints,
)
from launcher.run.state import reached_end
from launcher.versions import of_training

Say = Callable[[str], None]


def run_directory(recipe: Recipe) -> RunDirectory:
    """Where the run of a loaded recipe lies, whether or not it exists."""
    assert recipe.run.name is not None
    return RunDirectory(Path(recipe.run.dir, recipe.run.name))


@contextmanager
def owned(
    run: RunDirectory, submission: Submission | None = None, say: Callable[[str], object] = lambda text: None
) -> Iterator[Lease]:
    """Hold the lease of a run that may not exist yet; `say` tells of a wait and of a take-over.

    Raises:
        LeaseHeld: somebody else does; UserError: its directory cannot be written.
    """
    parent = run.path.parent
    made = not parent.exists()
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(hold_lease(run, submission=submission, waiting=say))
        except OSError as error:
            raise UserError(f"run.dir = {run.path.parent}: {run.path} cannot be written ({error.strerror}).") from None
        yield lease
    if made and not any(parent.iterdir()):  # the run was discarded
        parent.rmdir()


def copied(run: RunDirectory, recipe: Recipe, say: Say, *, hurry: Callable[[], bool]) -> AbstractContextManager[None]:
    """While this is open, checkpoints are copied to the recipe's mirror, if it has one; at its end the rest is.

    hurry: whether a person wants to wait no longer
    """
    if recipe.checkpoint.mirror is None:
        return nullcontext()
    from launcher.trainer.checkpoint.mirroring import mirrored

    return mirrored(run, recipe.checkpoint, say, hurry=hurry)


def open_run(run: RunDirectory, recipe: Recipe, plan: Plan, *, force: bool, say: Say) -> list[Change]:
    """Make the run, or go on with it; what changed in its recipe. The caller holds the lease.

    What the run lacks here and its mirror has is brought back first.

    Raises:
        UserError: the recipe is that of another run, and `force` is false; or, whatever `force` is, the run's
            checkpoints cannot go on with it. Nothing has been written.
    """
    found: list[Change] = []
    if recipe.checkpoint.mirror is not None:
        from launcher.trainer.checkpoint.mirroring import restore

        restore(run, recipe.checkpoint, say)
    if run.exists():
        _require_whole(run, force=force)
        _require_current_data(run, recipe, force=force)
        found = _go_on(run, recipe, plan, force=force, say=say)
    else:
        values = to_dict(recipe)
        run.create(values, plan.to_dict(), identity(values))
        remember(run, recipe)
    _say_empty_slots(plan, say)
    return found


def _require_whole(run: RunDirectory, *, force: bool) -> None:
    """Raises UserError where a run that has checkpoints would begin anew because a part of its directory is gone."""
    if lost := lost_beginnings(run):
        raise UserError(
            f"{run.ledger_file}: lost, or cut off: it does not know the attempts that wrote {', '.join(lost)}, so they "
            f"would not count. Nothing was deleted. `launcher checkpoint repair {run.path}` verifies them and writes "
            "the ledger anew."
        )
    if (gone := missing_checkpoints(run)) and not force:
        raise UserError(
            f"{run.checkpoints}: expected {', '.join(gone)}, with which the last attempt began; none is there, so the "
            "run would begin at step 0. Bring the folder back (is its disk mounted?), or begin anew with --force or "
            "under another run.name."
        )


def _say_empty_slots(plan: Plan, say: Say) -> None:
    """A new recipe is refused for it, but a run goes on with as many ranks as there are."""
    rows, micro, world_size = plan.global_batch_size, plan.micro_batch_size, plan.world_size
    if empty := empty_slots(global_batch_size=rows, micro_batch_size=micro, world_size=world_size):
        say(
            f"train.global_batch_size = {rows} on {world_size} ranks: {empty} slot{'s' * (empty > 1)} of each step "
            f"stay{'s' * (empty == 1)} empty (rows of weight 0, without effect on what is learnt)"
        )


def _go_on(run: RunDirectory, recipe: Recipe, plan: Plan, *, force: bool, say: Say) -> list[Change]:
    found = changes(run.read_recipe(), to_dict(recipe))
    newest = next(reversed(valid_checkpoints(run)), None)
    step = newest.step if newest else 0
    rate = ""
    if newest:
        _require_fit(run, recipe, found, newest)
        rate = _require_rate(run, recipe, found, newest)
    listed = [*found, *changed_contents(run, recipe), *(_surroundings(newest) if newest else ())]
    breaking = [change for change in listed if change.breaks_identity]
    if breaking and not force:
        lines = "\n".join(f"  {change.line(step)}" for change in breaking)
        fix = "Give the new run another run.name, or go on with --force."
        raise UserError(f"{run.path} is another run:\n{lines}\n{fix}")
    for change in listed:
        say(f"changed {change.line(step)}")
    if rate:
        say(rate)
    if breaking or force:
        run.data_file.unlink(missing_ok=True)
    if found:
        run.write_recipe(to_dict(recipe))
        run.write_plan(plan.to_dict())
    if listed:
        forced = [change.key for change in breaking]
        told = [{"what": c.key, "old": c.old, "new": c.new, "effect": c.effect(step)} for c in listed]
        record_changes(run, told, step=step if newest else None, forced=forced)
        remember(run, recipe)
    return found


def _require_rate(run: RunDirectory, recipe: Recipe, found: Sequence[Change], newest: CheckpointRef) -> str:
    """What the changes do to the learning rate of the next step, in words; empty where that stays.

    Raises:
        UserError: another length of the run moves it, and the recipe does not say whether that is meant.
    """
    old = Optimizer(**run.read_recipe()["optimizer"])
    before = _schedule_steps(run, newest) or old.schedule_steps or (read_json(run.data_file) or {}).get("total_steps")
    other_rows = any(change.breaks_identity for change in found)  # how many is known when they are prepared
    after = recipe.train.max_steps if other_rows else total_steps(run, recipe)
    if before is None or after is None:
        return ""
    if moved := jump(recipe.optimizer, newest.step, old_steps=before, new_steps=after):
        causes = [str(change) for change in found if change.key in LENGTH]
        raise UserError(moved.choice("; ".join(causes) or f"steps of the run: {before} -> {after}"))
    was = learning_rate(replace(old, schedule_steps=None), newest.step, before)
    rate = learning_rate(recipe.optimizer, newest.step, after)
    same = isclose(was, rate, rel_tol=1e-9)
    return "" if same else f"learning rate of step {newest.step + 1}: {was:.6g} -> {rate:.6g}"


def _schedule_steps(run: RunDirectory, newest: CheckpointRef) -> int | None:
    """Over how many steps the learning rate of the checkpoint was laid; None where it does not say."""
    return (read_json(newest.path / "manifest.json") or {}).get("schedule_steps")


def _surroundings(newest: CheckpointRef) -> Iterator[Change]:
    """Versions that are others here than where the checkpoint was written."""
    then = (read_json(newest.path / "manifest.json") or {}).get("versions") or {}
    now = of_training()
    for name, version in then.items():
        if version and now.get(name) and version != now[name]:
            yield Change(f"version of {name}", version, now[name], VERSIONS)


def _require_current_data(run: RunDirectory, recipe: Recipe, *, force: bool) -> None:
    """Raises UserError where another version of the launcher prepared the data of a run that is to go on."""
    if run.data_file.exists() and not force and not (reached_end(run) and agrees(run, recipe)):
        require_current(run, run.read_json("data.json"))


def _require_fit(run: RunDirectory, recipe: Recipe, found: Sequence[Change], newest: CheckpointRef) -> None:
    """Raises UserError where the newest checkpoint cannot go on with the recipe: other weights, or an end before it."""
    if unfit := [change for change in found if change.breaks_checkpoints]:
        listed = "\n".join(f"  {change.line(newest.step)}" for change in unfit)
        raise UserError(
            f"{run.path} has checkpoints of another model, which cannot go on with this one:\n{listed}\n"
            "Start another run: launcher run with run.name=..."
        )
    other_rows = any(change.breaks_identity for change in found)  # how many is known when they are prepared
    steps = recipe.train.max_steps if other_rows else total_steps(run, recipe)
    if steps is not None and steps < newest.step:
        limit = recipe.train.max_steps
        key, value = ("train.max_steps", limit) if limit is not None else ("train.epochs", recipe.train.epochs)
        raise UserError(
            f"{key} = {value}: expected at least the {newest.step} steps that {run.path} has reached, "
            f"this ends it at step {steps}. Give a larger one, or start another run with run.name=..."
        )


def discard_if_fresh(run: RunDirectory, attempt: int) -> None:
    """Remove a run whose first attempt learnt nothing because of the user's mistake: mended, it starts as a new run."""
    learnt = run.metrics_file.exists() and run.metrics_file.stat().st_size > 0
    if attempt == 1 and latest_attempt(run) == 1 and not learnt and not valid_checkpoints(run):
        shutil.rmtree(run.path)


def stored_recipe(run: RunDirectory, overrides: Sequence[str] = (), *, rules: Sequence[Rule] = ()) -> Recipe:
    """A run's own recipe with changes, its place being where it lies now.

    rules: the caller's own, beside those of every recipe

    Raises:
        RecipeError: what is wrong with the result; UserError: a change of place.
    """
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in ("run", *PLACE):
            raise UserError(f"{key}: a run's place is its directory, {run.path}: move the directory to rename it.")
    recipe = load(run.recipe_file, overrides, new=False, rules=rules).recipe
    recipe.run.dir, recipe.run.name = str(run.path.parent), run.path.name
    return recipe
