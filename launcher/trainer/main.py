"""All that one rank does, from run directory to outcome; the same under plain torchrun and under the supervisor."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory

_stop_signal: int | None = None


def run_rank(run_path: str, attempt: int) -> None:
    """Train as the rank that the environment names (torchrun's variables), and say in control/outcome how it ended.

    Args:
        run_path: run directory with recipe.yaml, plan.json and data.json
        attempt: number of this attempt in the ledger
    Raises:
        Exception: whatever ended the training, after its outcome was written; no collective is started then.
    """
    from launcher.run.control import Outcome, write_outcome
    from launcher.run.directory import RunDirectory

    run, rank, node = RunDirectory(Path(run_path)), int(os.environ.get("RANK", "0")), node_name()
    if os.environ.get("LAUNCHER_LOG") == "1":
        redirect_output(run.log_file(attempt, node, rank))
    listen_for_signals()
    progress: dict[str, Any] = {"step": 0}
    try:
        kind = _train(run, attempt, progress)
    except BaseException as error:
        from launcher.trainer.failures import failure_class

        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        step = _step(progress)
        outcome = Outcome("failed", failure_class(error), step, f"rank {rank}, step {step}: {error}", text, node)
        write_outcome(run, attempt, rank, outcome)
        raise
    write_outcome(run, attempt, rank, Outcome(kind, None, _step(progress), "", "", node))


def node_name() -> str:
    """This host in logs and outcomes."""
    return os.environ.get("LAUNCHER_NODE") or socket.gethostname()


def redirect_output(path: Path) -> None:
    """Send this process's standard output and error, C level too, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def listen_for_signals() -> None:
    """SIGTERM and SIGUSR1 ask for checkpoint-and-stop at the next step; Ctrl-C is for the launcher, which asks too."""

    def ask(number: int, frame: Any) -> None:
        global _stop_signal
        _stop_signal = number

    global _stop_signal
    _stop_signal = None
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_asked(run: RunDirectory, rank: int) -> bool:
    """Whether this rank got a signal, or, on rank 0, whether the run's stop request is there (one stat call)."""
    from launcher.run.control import stop_requested

    return _stop_signal is not None or (rank == 0 and stop_requested(run))


def _step(progress: dict[str, Any]) -> int:
    training = progress.get("training")
    return int(training.step if training is not None else progress["step"])


def _train(run: RunDirectory, attempt: int, progress: dict[str, Any]) -> Literal["finished", "stopped"]:
    from launcher.recipe.schema import from_dict
    from launcher.trainer import distributed
    from launcher.trainer.assembly import assemble
    from launcher.trainer.loop import train

    recipe = from_dict(run.read_recipe())
    ranks = distributed.Ranks.from_environment()
    accelerator = os.environ.get("LAUNCHER_ACCELERATOR") or recipe.cluster.accelerator
    device = distributed.choose_device(accelerator, ranks)
    distributed.set_threads(ranks)
    joined = distributed.join(device, ranks)
    training = assemble(
        run, recipe, attempt=attempt, ranks=ranks, device=device, stop_asked=lambda: stop_asked(run, ranks.rank)
    )
    progress["training"] = training
    kind = train(training)
    training.rows.close()
    if training.reports.figures is not None:
        training.reports.figures.close()
    if joined:
        distributed.leave()
    return kind
