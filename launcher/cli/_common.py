"""What several verbs share: finding the run a person means, and plain columns of text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError, nearest
from launcher.run.directory import RunDirectory

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe

RUNS_DIR = "runs"  # where runs lie unless run.dir says otherwise
SWEEP = ".sweep"  # behind a sweep's name: the folder of what an array job is handed
_SHOWN = 10  # names in a message


def find_run(text: str) -> RunDirectory:
    """The run that a person names: a path, or a name below runs/.

    Raises:
        UserError: there is no such run; the nearest name is shown.
    """
    for path in (Path(text), Path(RUNS_DIR, text)):
        if (run := RunDirectory(path)).exists():
            return run
    folder = Path(text).parent if "/" in text.rstrip("/") else Path(RUNS_DIR)
    names = [path.parent.name for path in folder.glob("*/run.json")]
    if said := _begin_so(text, names):
        raise UserError(said)
    if Path(text).is_dir():
        raise UserError(f"{text} is no run: it holds no run.json.")
    hint = nearest(Path(text).name, names) or f"Runs in {folder}/: {', '.join(sorted(names)[:10]) or 'none'}."
    raise UserError(f"no run '{text}': neither a path nor a name below {RUNS_DIR}/. {hint}")


def _begin_so(text: str, names: Sequence[str]) -> str:
    """What to say where the text is the name of a sweep, whose runs are called NAME-...; empty where none are."""
    from launcher.jobs.submissions import known_elsewhere

    name = Path(text).name
    if Path(text).is_dir() and not name.endswith(SWEEP):
        return ""
    base = name.removesuffix(SWEEP)
    known = {*names, *(run.name for run, _ in known_elsewhere())}
    if not base or not (found := sorted(run for run in known if run.startswith(f"{base}-"))):
        return ""
    more = f" and {len(found) - _SHOWN} more (launcher runs)" if len(found) > _SHOWN else ""
    these = f"{', '.join(found[:_SHOWN])}{more}"
    return f"no run '{text}', but {len(found)} whose name begins so, as those of a sweep: {these}. Give one of them."


def find_submitted(text: str) -> tuple[RunDirectory, Path]:
    """The run that a person names, and where its submissions are remembered: elsewhere for runs of other machines.

    Raises:
        UserError: there is no such run, here or among those.
    """
    from launcher.jobs.submissions import state_folder, submissions

    kept = state_folder(Path(text).name)
    known = submissions(kept)
    try:
        run = find_run(text)
        return run, (kept if known and known[-1].job.run == run.path.absolute() else run.path)
    except UserError:
        if not known or ("/" in text.rstrip("/") and known[-1].job.run != Path(text)):
            raise
    return RunDirectory(known[-1].job.run), kept


def load_for_target(text: str, overrides: Sequence[str], target: str | None) -> Recipe:
    """A recipe, or the one of a run, checked with the rules of the target that it, or --target, names.

    Raises:
        UserError: there is neither, or everything that is wrong with it.
    """
    from launcher.jobs import targets
    from launcher.jobs.opening import stored_recipe
    from launcher.jobs.submissions import submissions
    from launcher.recipe.check import load
    from launcher.recipe.presets import recipe_file

    if recipe_file(text) is not None or text.endswith((".yaml", ".yml")):
        return load_recipe(text, overrides, target)
    overrides, rules = _for_target(overrides, target), [targets.problems]
    try:
        run, place = find_submitted(text)
    except UserError as error:
        raise UserError(f"'{text}' is neither a recipe nor a run. As a run: {error}") from None
    if run.exists():
        return stored_recipe(RunDirectory(run.path.absolute()), overrides, rules=rules)
    return load(submissions(place)[-1].job.folder / "recipe.yaml", overrides, new=False, rules=rules).recipe


def load_sweep(
    text: str, overrides: Sequence[str], target: str | None, sweep: Sequence[str]
) -> tuple[str, list[Recipe]]:
    """Name and recipes of what --sweep makes of a recipe, checked as by `load_for_target`.

    Raises:
        UserError: it is a run, or everything that is wrong with a recipe or with --sweep.
    """
    from launcher.jobs.sweep import expand, parse
    from launcher.recipe.presets import recipe_file

    if recipe_file(text) is None and not text.endswith((".yaml", ".yml")):
        raise UserError(f"--sweep: makes new runs from a recipe, and '{text}' is none.")
    return expand(lambda changes: load_for_target(text, changes, target), overrides, parse(sweep))


def load_recipe(path: str, overrides: Sequence[str], target: str | None) -> Recipe:
    """A recipe, checked with the rules of the target that it, or --target, names; errors as of `load`."""
    from launcher.jobs import targets
    from launcher.recipe.check import load

    return load(path, _for_target(overrides, target), rules=[targets.problems]).recipe


def _for_target(overrides: Sequence[str], target: str | None) -> Sequence[str]:
    from launcher.jobs import targets

    if target is None:
        return overrides
    targets.require(target)
    return [*overrides, f"cluster.target={target}"]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def job_line(job: Mapping[str, Any] | None, *, always_reason: bool = False) -> str:
    """`slurm 4711 queued (Priority)`; a reason where the state alone says too little, or always."""
    if job is None:
        return "-"
    tells = always_reason or job["state"] not in ("running", "finished", "cancelled")
    return f"{job['target']} {job['id']} {job['state']}" + (f" ({job['reason']})" if job["reason"] and tells else "")


def clock(seconds: float | None) -> str:
    """Unix seconds as local time; `-` if not known."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def progress(step: int | None, total_steps: int | None) -> str:
    """`120/400`, with `?` for what is not known yet."""
    return f"{'?' if step is None else step}/{'?' if total_steps is None else total_steps}"
