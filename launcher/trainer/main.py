"""All that one rank does, from run directory to outcome; the same under plain torchrun and under the supervisor."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from launcher.run.control import Outcome
    from launcher.run.directory import RunDirectory

ERROR = "error: "  # in a rank's log, before what the launcher says at the end

_stop_signal: int | None = None


def run_rank(run_path: str, attempt: int) -> None:
    """Train as the rank that the environment names (torchrun's variables), and say in control/outcome how it ended.

    Args:
        run_path: run directory with recipe.yaml, plan.json and data.json
        attempt: number of this attempt in the ledger
    Raises:
        Exception: whatever ended the training, after its outcome was written; no collective is started then.
    """
    from launcher.run.control import Outcome
    from launcher.run.directory import RunDirectory
    from launcher.run.reserve import keep_back
    from launcher.run.secrets import masked_by, named_by
    from launcher.trainer.beat import begin as begin_beats

    run, rank, node = RunDirectory(Path(run_path)), int(os.environ.get("RANK", "0")), node_name()
    logged = os.environ.get("LAUNCHER_LOG") == "1"
    mask = masked_by(named_by(run))
    if logged:
        redirect_output(run.log_file(attempt, node, rank), who=f"rank {rank}", mask=mask)
    keep_back(run.rank_reserve(rank))
    begin_beats(rank)
    listen_for_signals()
    progress: dict[str, Any] = {"step": 0}
    try:
        kind = _train(run, attempt, progress)
    except BaseException as error:
        from launcher.trainer.failures import failure_class, is_known, rolls_back

        known = is_known(error)
        text = "" if known else mask(traceback.format_exc())
        message = mask(str(error) if known else f"{type(error).__name__}: {error}")
        outcome = Outcome(
            "failed", failure_class(error), _step(progress), message, text, node, rolls_back=rolls_back(error)
        )
        _tell(run, attempt, rank, outcome)
        if text or logged:  # under plain torchrun whoever catches it says it
            print(text or f"{ERROR}{message}", file=sys.stderr, flush=True)
        raise
    _tell(run, attempt, rank, Outcome(kind, None, _step(progress), "", "", node))


def _tell(run: RunDirectory, attempt: int, rank: int, outcome: Outcome) -> None:
    """Write the outcome; one that cannot be written is said in the log, and the way the rank ended stays as it is."""
    from launcher.run.control import write_outcome

    try:
        write_outcome(run, attempt, rank, outcome)
    except OSError as error:
        print(f"warning: how rank {rank} ended could not be written: {error}", flush=True)


def node_name() -> str:
    """This host in logs and outcomes."""
    return os.environ.get("LAUNCHER_NODE") or socket.gethostname()


def redirect_output(path: Path, *, who: str, mask: Callable[[str], str]) -> None:
    """Send this process's standard output and error, C level too, to the end of a file; Python's output masked.

    A write to a full disk raises nothing: the text waits, and where this process wrote before is told so once.
    """
    from launcher.run.output import PatientStream

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    before = PatientStream(os.dup(2))
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)

    def trouble(why: str) -> None:
        before.write(f"warning: {who}: its log cannot be written ({why}). Training goes on.\n")

    sys.stdout = sys.stderr = PatientStream(1, trouble, mask)


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


def set_tf32(wanted: bool, device: torch.device) -> str:
    """Let fp32 matrix products round their factors to TF32, or not; a line for the log."""
    import torch

    if device.type != "cuda":
        return f"tf32: false ({'train.tf32 changes nothing' if wanted else 'exact fp32'} on the CPU)"
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    return f"tf32: {str(wanted).lower()} (train.tf32)"


def _train(run: RunDirectory, attempt: int, progress: dict[str, Any]) -> Literal["finished", "stopped"]:
    from launcher.recipe.schema import from_dict
    from launcher.trainer import distributed
    from launcher.trainer.assembly import assemble
    from launcher.trainer.beat import beat
    from launcher.trainer.loop import train
    from launcher.trainer.preflight import preflight

    recipe = from_dict(run.read_recipe())
    ranks = distributed.Ranks.from_environment()
    accelerator = os.environ.get("LAUNCHER_ACCELERATOR") or recipe.cluster.accelerator
    device = distributed.choose_device(accelerator, ranks)
    distributed.set_threads(ranks)
    said = set_tf32(recipe.train.tf32, device)
    if ranks.rank == 0:
        print(said, flush=True)
    joined = distributed.join(device, ranks)
    beat("start")
    if recipe.cluster.preflight and (ranks.world_size > 1 or device.type == "cuda"):
        preflight(run, attempt, ranks=ranks, device=device, node=node_name())
    beat("start")  # whatever moves shows that this rank lives
    training = assemble(
        run, recipe, attempt=attempt, ranks=ranks, device=device, stop_asked=lambda: stop_asked(run, ranks.rank)
    )
    progress["training"] = training
    try:
        kind = train(training)
    except BaseException:
        training.rows.close(failed=True)
        raise
    training.rows.close()
    if training.reports.figures is not None:
        training.reports.figures.close()
    if joined:
        distributed.leave()
    return kind
