"""One rank under plain torchrun: `torchrun ... -m launcher.trainer RUN`; ends 0, 1 or 2, state.json says the rest.

`accelerate launch ... -m launcher.trainer RUN` is the same, where its settings agree with the run.
Without --attempt or LAUNCHER_ATTEMPT, rank 0 starts an attempt of its own in the run's ledger and holds the run's
lease, as `launcher run` would, and the others are told its number.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_USER_ERROR, UserError
from launcher.run.processes import die_with_parent
from launcher.trainer.launch_check import LAUNCHED

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory


def main() -> None:
    """Train, then end by `os._exit`: gloo's threads abort a process that shuts its interpreter down."""
    from launcher.trainer.distributed import exit_now

    parser = argparse.ArgumentParser(prog="python -m launcher.trainer", description=__doc__)
    parser.add_argument("run", help="run directory, prepared: recipe.yaml, plan.json and data.json are there")
    given = "number of an attempt that somebody else started and ends  [default: LAUNCHER_ATTEMPT]"
    parser.add_argument("--attempt", type=int, default=os.environ.get("LAUNCHER_ATTEMPT"), help=given)
    arguments = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ or LAUNCHED in os.environ:  # killed, they would leave their ranks behind
        die_with_parent(os.getppid())
    try:
        if _nothing_to_do(Path(arguments.run)):
            exit_now(EXIT_FINISHED)
        _agree(Path(arguments.run))
        with _attempt(Path(arguments.run), arguments.attempt) as attempt:
            from launcher.trainer.main import run_rank

            run_rank(arguments.run, attempt)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_now(EXIT_USER_ERROR)
    except BaseException as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        exit_now(EXIT_FAILED)
    exit_now(EXIT_FINISHED)


def _nothing_to_do(path: Path) -> bool:
    """Whether the run is finished, which its first rank says; every rank reads the same before any of them meet.

    Raises:
        UserError: there is no run, or its data is not prepared.
    """
    from launcher.run.directory import RunDirectory
    from launcher.run.state import reached_end

    run = RunDirectory(path)
    if not run.exists():
        raise UserError(f"{path}: no run lies there. `python -m launcher.jobs.begin RECIPE` makes one.")
    if not run.data_file.exists():
        raise UserError(f"{path}: its data is not prepared. `python -m launcher.jobs.begin RECIPE` does that.")
    finished = reached_end(run)
    if finished and os.environ.get("RANK", "0") == "0":
        print(f"{path} is finished; a larger train.max_steps or train.epochs would lengthen it.", flush=True)
    return finished


def _agree(path: Path) -> None:
    """Raises UserError where the settings of what started this rank contradict the run's recipe."""
    from launcher.run.directory import RunDirectory
    from launcher.trainer.launch_check import require_agreement

    require_agreement(RunDirectory(path))


@contextlib.contextmanager
def _attempt(path: Path, given: int | None) -> Iterator[int]:
    """The number of the attempt; one that is started here is also ended here."""
    if given is not None:
        yield given
        return
    import torch
    import torch.distributed as dist

    from launcher.recipe.schema import from_dict
    from launcher.run.control import clear_stop
    from launcher.run.directory import RunDirectory
    from launcher.run.lease import hold_lease
    from launcher.run.ledger import start_attempt
    from launcher.run.provenance import record_beside, recorded
    from launcher.trainer.checkpoint.mirroring import mirrored
    from launcher.trainer.distributed import Ranks, choose_device, join, leave
    from launcher.trainer.main import node_name

    run, ranks = RunDirectory(path), Ranks.from_environment()
    accelerator = os.environ.get("LAUNCHER_ACCELERATOR") or from_dict(run.read_recipe()).cluster.accelerator
    device = choose_device(accelerator, ranks)
    join(device, ranks)
    number = torch.zeros((), dtype=torch.int64, device=device)
    with contextlib.ExitStack() as held:
        if ranks.rank == 0:
            held.enter_context(hold_lease(run))
            held.enter_context(mirrored(run, from_dict(run.read_recipe()).checkpoint, _say))
            clear_stop(run)
            number += start_attempt(
                run,
                target=_starter(),
                job_id=os.environ.get("LAUNCHER_JOB_ID"),
                nodes=[node_name()],
                reason=f"plain {_starter()}",
            )
            run.job(int(number)).mkdir(parents=True, exist_ok=True)
            record_beside(run.job(int(number)))
        dist.broadcast(number, src=0)
        try:
            yield int(number)
        finally:
            if ranks.rank == 0:
                recorded()
                _end(run, int(number))
        leave()


def _say(text: str) -> None:
    print(text, flush=True)


def _starter() -> str:
    """Who started the ranks, for the ledger."""
    return "accelerate" if LAUNCHED in os.environ else "torchrun"


def _end(run: RunDirectory, attempt: int) -> None:
    """What the supervisor would write: the end of the attempt, and the state of one that failed."""
    from launcher.run.control import read_outcomes
    from launcher.run.ledger import end_attempt
    from launcher.run.state import write_state

    mine = read_outcomes(run, attempt).get(0)
    kind, step = ("unknown", None) if mine is None else (mine.failure_class or mine.kind, mine.step)
    if mine is None or mine.kind == "failed":
        write_state(run, "failed", attempt=attempt, step=step)
    end_attempt(run, attempt, step=step, outcome_class=kind)


if __name__ == "__main__":
    main()
