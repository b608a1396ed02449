"""Node 0's first act: the data store and data.json, made before any rank and outside any collective (L8)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.jobs import rank, warm
from launcher.recipe.schema import Recipe
from launcher.run.data import epoch_rows, is_current, stores
from launcher.run.directory import RunDirectory

Progress = Callable[[str, int, int], None]  # what is being done, how much, of how much (0: unknown)


def complete_plan(run: RunDirectory) -> None:
    """Put what only the data tell into the run's plan.json: rows, steps of an epoch, steps in all."""
    data, plan = run.read_json("data.json"), run.read_json("plan.json")
    known = {
        "rows": data["train"]["epoch_rows"],
        "steps_per_epoch": data["steps_per_epoch"],
        "total_steps": data["total_steps"],
    }
    if any(plan[key] != value for key, value in known.items()):
        run.write_plan({**plan, **known})


_LAST_WORDS_S = 10.0


class PreparationError(Exception):
    """Preparation failed by no mistake of the user; the text is the traceback."""


class StopAsked(Exception):
    """The run was asked to stop before its data was ready."""


def is_prepared(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether data.json agrees with the recipe and the stores it names exist."""
    if not agrees(run, recipe):
        return False
    data = run.read_json("data.json")
    return is_current(data) and all(store.is_dir() for store in stores(data))


def agrees(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether data.json is there and of the recipe's length and batch."""
    if not run.data_file.exists():
        return False
    data = run.read_json("data.json")
    if data["global_batch_size"] != recipe.train.global_batch_size:
        return False
    if recipe.train.max_steps is not None:
        return bool(data["total_steps"] == recipe.train.max_steps and data["total_rows"] is None)
    return bool(data["total_rows"] == _rows(data, recipe))


def total_steps(run: RunDirectory, recipe: Recipe) -> int | None:
    """Steps after which the recipe ends this run; None where epochs end it and its rows are not known yet."""
    if recipe.train.max_steps is not None or not run.data_file.exists():
        return recipe.train.max_steps
    return -(-_rows(run.read_json("data.json"), recipe) // recipe.train.global_batch_size)


def _rows(data: Mapping[str, Any], recipe: Recipe) -> int:
    """Rows of all epochs together."""
    return max(1, round(epoch_rows(data) * (recipe.train.epochs or 1)))


def prepare_in_child(run: RunDirectory, *, progress: Progress, stop: Callable[[], bool]) -> None:
    """Prepare in a warm process, so that this one stays free of the data libraries and answers signals meanwhile.

    progress: called with what is being done, how much of it, and of how much
    stop: asked ten times a second; preparation is given up when it says so, what it has built so far is kept

    Raises:
        UserError: what the data say is wrong; StopAsked: `stop` said so; PreparationError: anything else
        warm.StandsStill: the process that was to start it
    """
    receiver, sender = warm.context().Pipe(duplex=False)
    child = warm.context().Process(target=rank.prepare, args=(str(run.path), warm.server_pid(), sender))
    try:
        if not warm.begin(child, stop=stop):
            raise StopAsked
    except (EOFError, ConnectionError):
        raise PreparationError("the fork server ended while it imported the trainer; what it said is above") from None
    sender.close()
    try:
        while not stop():
            if not receiver.poll(0.1):
                continue
            try:
                kind, *what = receiver.recv()
            except EOFError:
                child.join()
                raise PreparationError(f"the process that prepared ended with {child.exitcode}") from None
            if kind == "done":
                return
            if kind == "user":
                raise UserError(what[0])
            if kind == "failed":
                raise PreparationError(what[0])
            progress(*what)
        child.kill()
        raise StopAsked
    finally:
        receiver.close()
        child.join(_LAST_WORDS_S)  # it has spoken, and now tidies up
        child.kill()
        child.join()


def prepare_run(run_path: str, progress: Progress) -> None:
    """Prepare what the run's recipe names and write data.json, in this process.

    Raises:
        UserError: the data cannot be learnt from, or not with the recipe's objective.
    """
    from launcher.data.prepare import prepare, write_data_json
    from launcher.recipe.schema import from_dict

    run = RunDirectory(Path(run_path))
    recipe = from_dict(run.read_recipe())
    prepared = prepare(recipe, progress=_seldom(progress))
    _require_plain(recipe, prepared.to_dict())
    write_data_json(run, prepared)


def _require_plain(recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Refuse what the objective would learn wrongly: the bad answers of preference and labelled records."""
    for key, entries in (("train", data["train"]["sources"]), ("eval", (data["eval"] or {"sets": []})["sets"])):
        for entry in entries:
            groups = entry.get("groups", {})
            for kind, what in (("pairs", "pairs of a chosen and a rejected answer"), ("labelled", "labelled answers")):
                if groups.get(kind):
                    raise UserError(
                        f"data.{key}: {entry['name']} holds {groups[kind]:,} {what} ({'; '.join(_said(entry))}), and "
                        f"objective.kind = {recipe.objective.kind} would learn the bad answers, too. Set the source's "
                        "format and columns so that only good answers are read, or remove the source."
                    )


def _said(entry: Mapping[str, Any]) -> list[str]:
    return [f"read as {entry['format']}"] if "format" in entry else list(entry["formats"])


def _seldom(progress: Progress, every_s: float = 0.1) -> Progress:
    """Lets through the first and last call of each work and ten a second between."""
    last: dict[str, float] = {}

    def call(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.get(what, 0.0) >= every_s:
            last[what] = now
            progress(what, done, total)

    return call
