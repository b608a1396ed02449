"""`python -m launcher.jobs.begin RECIPE [HOST:PORT] [KEY=VALUE ...]`: node 0's first act before torchrun's ranks.

For scripts made by `launcher render`, and by hand; the ranks then start an attempt of their own and say how it ended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from launcher.run.data import remarks


def main(recipe_file: Path, endpoint: str | None = None, overrides: Sequence[str] = ()) -> None:
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
    recipe = load(recipe_file, overrides, new=False).recipe
    plan, run = make_plan(recipe), run_directory(recipe)
    with owned(run):
        open_run(run, recipe, plan, force=False, say=console.say)
        if not is_prepared(run, recipe):
            prepare_run(str(run.path), console.working)
            for line in remarks(run.read_json("data.json")):
                console.say(line)
        complete_plan(run)
    console.close()


def read(arguments: Sequence[str]) -> tuple[Path, str | None, list[str]]:
    """Recipe, HOST:PORT and changes of a command line.

    Raises:
        UserError: it is another one.
    """
    overrides = [argument for argument in arguments if "=" in argument]
    match [argument for argument in arguments if "=" not in argument]:
        case [recipe]:
            return Path(recipe), None, overrides
        case [recipe, endpoint]:
            return Path(recipe), endpoint, overrides
    given = " ".join(arguments) or "nothing"
    raise UserError(
        f"python -m launcher.jobs.begin: expected RECIPE [HOST:PORT] [KEY=VALUE ...], got {given}. "
        "HOST:PORT is only for jobs of several nodes, as `launcher render` writes them."
    )


if __name__ == "__main__":
    try:
        main(*read(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
