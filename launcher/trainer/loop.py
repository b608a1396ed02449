"""The training loop: next rows, forward and backward, step, report, checkpoint, stop?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from launcher.data.store import Store
from launcher.trainer.engines import Engine
from launcher.trainer.evaluation import evaluate
from launcher.trainer.metrics import plot_loss
from launcher.trainer.optim import learning_rate
from launcher.trainer.randomness import rekey
from launcher.trainer.reports import Pending, Reports
from launcher.trainer.rows import Prefetch, StepRows
from launcher.trainer.saving import Saver
from launcher.trainer.trouble import Trouble

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.run.directory import RunDirectory
    from launcher.trainer.distributed import Ranks

STATE_EVERY_S = 3.0


@dataclass(slots=True)
class Training:
    """Everything a rank needs to train.

    eval_sets: stores of the evaluation sets by name; empty: none
    step: updates finished
    stop_asked: whether this rank was asked to stop (a signal on any rank, the run's stop request on rank 0)
    """

    recipe: Recipe
    run: RunDirectory
    attempt: int
    ranks: Ranks
    engine: Engine
    rows: Prefetch
    eval_sets: dict[str, Store]
    backend: str
    reports: Reports
    saver: Saver
    stop_asked: Callable[[], bool]
    total_steps: int
    step: int = 0
    state_written: float = 0.0
    state_trouble: Trouble = field(default_factory=lambda: Trouble("state.json"))


def train(t: Training) -> Literal["finished", "stopped"]:
    """Train until the last step or until the ranks agree to stop; the last checkpoint is on disk when this returns.

    Nothing here waits for the step that is under way: its figures are read while the next one runs, so a stop asked
    for, a save asked for by rank 0 and a loss that is not finite take effect one step late, on all ranks alike.

    Raises:
        NonFiniteError, DataError, SaveError, StaleAttempt: see there.
    """
    if t.step >= t.total_steps:
        write_state(t, "finished")
        return "finished"
    pending: Pending | None = None
    stop = False
    write_state(t, "running")
    if t.step == 0 and is_evaluation_due(t):
        run_evaluation(t)  # what is later compared with
    while t.step < t.total_steps and not stop:
        rows = t.rows.take(t.step)
        rekey(t.recipe.train.seed, t.step, t.ranks.rank)
        loss = accumulate(t, rows)
        lr = learning_rate(t.recipe.optimizer, t.step, t.total_steps)
        norm = t.engine.clip_and_step(lr, t.recipe.train.max_grad_norm)
        report = t.reports.send(
            rows, loss=loss, nonfinite=t.engine.nonfinite, norm=norm, lr=lr, stop=t.stop_asked(), save=t.saver.wanted()
        )
        signals = t.reports.read(pending)
        pending, stop = report, signals.stop
        t.step += 1
        evaluation_due, save_due = is_evaluation_due(t), (t.saver.due(t.step) or signals.save) and not stop
        if evaluation_due or save_due:  # both wait for the device, and no checkpoint holds a step that is not written
            stop, pending = t.reports.read(pending).stop or stop, None
        if evaluation_due:
            run_evaluation(t)
        if save_due:
            t.saver.save(t.step)
        if t.saver.look() or time.monotonic() - t.state_written >= STATE_EVERY_S:
            write_state(t, "running")
    t.reports.read(pending)
    t.saver.save_durably(t.step, t.engine.device)
    if t.step < t.total_steps:
        write_state(t, "preempted")
        return "stopped"
    finish(t)
    return "finished"


def accumulate(t: Training, rows: StepRows) -> Tensor:
    """Forward and backward of this rank's micro-batches.

    The loss is sum / weight of the *global* batch, known from the store, and gradients are averaged over the ranks.

    Returns:
        This rank's share of the global batch's loss, 0-d float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=t.engine.device)
    for i, batch in enumerate(rows.micro):
        last = i == len(rows.micro) - 1
        total += t.engine.forward_backward(batch, loss_scale=t.ranks.world_size / rows.weight, sync=last)
    return total / rows.weight


def is_evaluation_due(t: Training) -> bool:
    """Whether the number of steps asks for one."""
    every = t.recipe.train.eval_every_steps
    return every is not None and t.step % every == 0


def run_evaluation(t: Training) -> None:
    """Evaluate where there are evaluation rows; collective."""
    if not t.eval_sets:
        return
    begin = time.perf_counter()
    losses = evaluate(
        t.engine, t.eval_sets, micro_batch_size=t.recipe.train.micro_batch_size, rank=t.ranks.rank,
        world_size=t.ranks.world_size, backend=t.backend,
    )  # fmt: skip
    if t.reports.figures is not None:
        t.reports.figures.evaluation(t.step, losses)
    t.reports.pause(time.perf_counter() - begin)


def finish(t: Training) -> None:
    """The last evaluation, the picture of the loss, the state."""
    if not is_evaluation_due(t):
        run_evaluation(t)
    if t.reports.figures is not None:
        t.reports.figures.metrics.sync()
        with Trouble(t.run.loss_png.name).said():
            plot_loss(t.run.metrics_file, t.run.loss_png, title=str(t.recipe.run.name or "loss"))
        t.reports.figures.say_mix()
    write_state(t, "finished")


def write_state(t: Training, status: str) -> None:
    """Rank 0 writes state.json; one that cannot be written is tried again later, the last one by the launcher.

    Raises:
        StaleAttempt: a newer attempt has started, this one no longer counts.
    """
    if t.ranks.rank == 0:
        from launcher.run.state import write_state as write

        last = t.reports.figures.last if t.reports.figures is not None else {}
        with t.state_trouble.said():
            write(t.run, status, attempt=t.attempt, step=t.step, total_steps=t.total_steps, loss=last.get("loss"))
    t.state_written = time.monotonic()
