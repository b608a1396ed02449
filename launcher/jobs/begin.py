"""`python -m launcher.jobs.begin RECIPE [HOST:PORT]`: node 0's first act where torchrun starts the ranks.

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
from launcher.jobs.rendezvous import address, require_free_port
from launcher.jobs.spec import ENDPOINT
from launcher.plan import make_plan
from launcher.recipe.check import load


def main(recipe_file: Path, endpoint: str | None = None) -> None:
    """Make or open the run of a recipe and prepare its data.

    endpoint: HOST:PORT at which the nodes of a job will meet on this one; None: there is no other node

    Raises:
        UserError: whatever is wrong here; where it is the endpoint, nothing has been written.
    """
    require_train_extra()
    if endpoint is not None:
        name = f"{ENDPOINT}={endpoint}"
        require_free_port(address(endpoint, name=f"{ENDPOINT} =")[1], name=name)
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
        main(Path(sys.argv[1]), *sys.argv[2:3])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
