"""How another tool's checkpoint becomes the first one of a new run: matched first, then written as attempt 1."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from launcher.errors import UserError
from launcher.jobs.opening import open_run, owned, run_directory
from launcher.plan import make_plan
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory
from launcher.run.ledger import end_attempt, start_attempt
from launcher.run.state import write_state


def import_checkpoint(path: Path, recipe: Recipe, *, weights_only: bool, say: Callable[[str], None]) -> RunDirectory:
    """Make the run of a loaded recipe, with one checkpoint.

    Raises:
        UserError: the run exists, or the checkpoint lacks something or does not fit; nothing has been written then.
    """
    from launcher.convert import open_import

    run = run_directory(recipe)
    if run.exists():
        raise UserError(f"{run.path}: is a run already: expected a new one. Give it another name with run.name=...")
    found = open_import(path, recipe, weights_only=weights_only)
    last = recipe.train.max_steps
    if last is not None and found.step >= last:
        raise UserError(
            f"train.max_steps = {last}: expected more than the {found.step} steps of {path}, "
            "because steps are counted on from there."
        )
    with owned(run):
        if run.exists():
            raise UserError(f"{run.path}: is a run already: expected a new one. Give it another name with run.name=...")
        try:
            open_run(run, recipe, make_plan(recipe), force=False, say=say)
            attempt = start_attempt(run, target="import", job_id=None, nodes=[socket.gethostname()], reason=str(path))
            folder = found.write(run, attempt)
            end_attempt(run, attempt, step=found.step, outcome_class="stopped")
            write_state(run, "preempted", attempt=attempt, step=found.step)
        except BaseException as error:
            shutil.rmtree(run.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"{run.path}: cannot be written ({error.strerror or error}).") from None
            raise
    for note in found.notes():
        say(note)
    say(f"written as {folder}")
    return run
