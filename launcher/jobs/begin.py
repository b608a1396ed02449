"""`python -m launcher.jobs.begin RECIPE`: node 0's first act in a job that plain torchrun starts: directory and data.

For scripts made by `launcher render`; the ranks then start an attempt of their own and say how it ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.errors import EXIT_USER_ERROR, UserError
from launcher.jobs.console import Console
from launcher.jobs.environment import require_train_extra
from launcher.jobs.opening import open_run, owned, run_directory
from launcher.jobs.preparation import complete_plan, is_prepared, prepare_run
from launcher.plan import make_plan
from launcher.recipe.check import load


def main(recipe_file: Path) -> None:
    """Make or open the run of a recipe and prepare its data."""
    require_train_extra()
    console = Console()
    recipe = load(recipe_file, new=False).recipe
    plan, run = make_plan(recipe), run_directory(recipe)
    with owned(run):
        open_run(run, recipe, plan, force=False, say=console.say)
        if not is_prepared(run, recipe):
            prepare_run(str(run.path), console.working)
        complete_plan(run)
    console.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
