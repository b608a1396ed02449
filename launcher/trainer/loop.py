"""The training loop: next rows, forward and backward, step, report, checkpoint, stop?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from launcher.data.store import Store
from launcher.plan.schedule import learning_rate
from launcher.run.left_out import LeftOut, leave_out
from launcher.trainer.beat import PaceKeeper, beat
from launcher.trainer.engines import Engine
from launcher.trainer.evaluation import evaluate
from launcher.trainer.failures import RollBack
from launcher.trainer.metrics import plot_loss
from launcher.trainer.own_time import own_time
from launcher.trainer.randomness import rekey
from launcher.trainer.replicas import Replicas
from launcher.trainer.reports import Pending, Reports, Signals
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
    left_out: the global batches that make no update, by step from 1
    step: updates finished
    save_owed: a save was due after a step without an update, so it follows the next one with one
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
    replicas: Replicas
    left_out: Mapping[int, LeftOut]
    stop_asked: Callable[[], bool]
    total_steps: int
    step: int = 0
    save_owed: bool = False
    state_written: float = 0.0
    state_trouble: Trouble = field(default_factory=lambda: Trouble("state.json"))


def train(t: Training) -> Literal["finished", "stopped"]:
    """Train until the last step or until the ranks agree to stop; the last checkpoint is on disk when this returns.

    Nothing here waits for the step that is under way: its figures are read while the next one runs, so a stop asked
    for, a save asked for by rank 0 and a loss that is not finite take effect one step late, on all ranks alike.

    Raises:
        NonFiniteError, SpikeError, RollBack, ReplicaError, DataError, SaveError, StaleAttempt: see there.
    """
    try:
        return take_steps(t)
    except RollBack as back:
        write_down(t, back)
        raise


def take_steps(t: Training) -> Literal["finished", "stopped"]:
    """See `train`."""
    if t.step >= t.total_steps:
        write_state(t, "finished")
        return "finished"
    pending: Pending | None = None
    stop = False
    pace = PaceKeeper(own_time(t.engine, compiled=t.recipe.model.compile))
    write_state(t, "running")
    if t.step == 0 and is_evaluation_due(t):
        run_evaluation(t)  # what is later compared with
    while t.step < t.total_steps and not stop:
        beat("data", t.step)
        rows = t.rows.take(t.step)
        lr = learning_rate(t.recipe.optimizer, t.step, t.total_steps)
        if (batch := t.left_out.get(t.step + 1)) is not None:
            stop, pending = t.reports.read(pending).stop, None
            pass_over(t, rows, lr, batch)
            signals = Signals(stop)
        else:
            report = make_update(t, rows, lr)
            beat("report")
            signals = t.reports.read(pending)
            pending, stop = report, signals.stop
        t.step += 1
        pace.step(t.step, rows.wait_s)
        evaluation_due, save_due = is_evaluation_due(t), is_save_due(t, signals) and not stop
        if evaluation_due or save_due:  # both wait for the device, and no checkpoint holds a step that is not written
            stop, pending = t.reports.read(pending).stop or stop, None
        if evaluation_due:
            run_evaluation(t)
        t.save_owed = save_due and t.reports.guards.in_a_row > 0  # what spoilt a step may be in the weights
        if save_due and not t.save_owed:
            beat("save", t.step)
            t.replicas.compare(t.step)
            t.saver.save(t.step)
        if t.saver.look() or time.monotonic() - t.state_written >= STATE_EVERY_S:
            write_state(t, "running")
    t.reports.read(pending)
    beat("save", t.step)
    t.saver.save_durably(t.step, t.engine.device)
    if t.step < t.total_steps:
        beat("end")
        write_state(t, "preempted")
        return "stopped"
    finish(t)
    beat("end")
    return "finished"


def make_update(t: Training, rows: StepRows, lr: float) -> Pending:
    """One optimizer step; its figures are on their way to the other ranks when this returns."""
    rekey(t.recipe.train.seed, t.step, t.ranks.rank)
    loss = accumulate(t, rows)
    beat("step")
    if t.replicas.due(t.step + 1):
        t.replicas.compare(t.step)
    max_norm, wishes = t.recipe.train.max_grad_norm, {"stop": t.stop_asked(), "save": t.saver.wanted()}
    if t.reports.guards.drops_spikes:
        gate = t.reports.gate(t.step + 1, loss=loss, **wishes)
        norm, reduction = t.engine.clip_and_step(lr, max_norm, gate), gate.reduction
    else:
        norm = t.engine.clip_and_step(lr, max_norm)
        reduction = t.reports.reduce(loss=loss, nonfinite=t.engine.nonfinite, **wishes)
    return t.reports.sent(rows, reduction, nonfinite=t.engine.nonfinite, norm=norm, lr=lr)


def pass_over(t: Training, rows: StepRows, lr: float, batch: LeftOut) -> None:
    """A step whose global batch is left out: its rows and its place in the schedule are used up, nothing is learnt."""
    t.reports.guards.leave()
    if t.reports.figures is not None:
        t.reports.figures.left_out(rows, lr, batch, t.reports.guards.counts())


def write_down(t: Training, back: RollBack) -> None:
    """Rank 0 writes what is to be left out, durably; collective, and before any rank says how it ends."""
    for step in back.steps:
        records = t.rows.records(step - 1)
        if t.ranks.rank == 0:
            loss = back.loss if step == back.steps[-1] and math.isfinite(back.loss) else None
            entry = LeftOut(
                step=step, attempt=t.attempt, reason=back.reason, loss=loss, limit=back.limit, records=records,
                time=time.time(),
            )  # fmt: skip
            leave_out(t.run, entry)
            where = "; ".join(
                f"{source} {', '.join(map(str, found[:8]))}{' ...' * (len(found) > 8)}"
                for source, found in (records or {}).items()
            )
            print(
                f"step {step} is left out from now on: {t.run.left_out_file.name} has its records ({where}); "
                f"`launcher preview {t.run.path} --step {step}` shows its rows", flush=True,
            )  # fmt: skip


def accumulate(t: Training, rows: StepRows) -> Tensor:
    """Forward and backward of this rank's micro-batches.

    The loss is sum / weight of the *global* batch, known from the store, and gradients are averaged over the ranks.

    Returns:
        This rank's share of the global batch's loss, 0-d float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=t.engine.device)
    for i, batch in enumerate(rows.micro):
        beat("forward")
        last = i == len(rows.micro) - 1
        total += t.engine.forward_backward(batch, loss_scale=t.ranks.world_size / rows.weight, sync=last)
    return total / rows.weight


def is_save_due(t: Training, signals: Signals) -> bool:
    """Whether the number of steps asks for a checkpoint, or the clock on rank 0, or one is owed."""
    return t.saver.due(t.step) or signals.save or t.save_owed


def is_evaluation_due(t: Training) -> bool:
    """Whether the number of steps asks for one."""
    every = t.recipe.train.eval_every_steps
    return every is not None and t.step % every == 0


def run_evaluation(t: Training) -> None:
    """Evaluate where there are evaluation rows; collective."""
    if not t.eval_sets:
        return
    begin = time.perf_counter()
    beat("eval", t.step)
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
            more = {"total_steps": t.total_steps, "loss": last.get("loss")}
            if t.saver.interval is not None:
                more["save_every"] = t.saver.interval.told()
            write(t.run, status, attempt=t.attempt, step=t.step, **more)
    t.state_written = time.monotonic()
