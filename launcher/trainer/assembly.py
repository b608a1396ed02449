"""Puts a rank's parts together from the run directory: engine with weights or checkpoint, rows, reports, saver."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.data.batches import Batches
from launcher.data.mix import Mix
from launcher.data.order import USUAL_COST
from launcher.data.store import Store
from launcher.errors import UserError
from launcher.plan import row_cost
from launcher.plan.saving import SaveCost, stop_lead_s
from launcher.plan.schedule import jump
from launcher.run.data import require_current
from launcher.run.left_out import LeftOut, left_out
from launcher.run.rehearsal import read_rehearsal
from launcher.trainer import engines, frozen, model, objectives
from launcher.trainer.checkpoint.reader import read_manifest
from launcher.trainer.guards import Guards
from launcher.trainer.interval import SaveInterval
from launcher.trainer.launch_check import other_precision
from launcher.trainer.loop import Training
from launcher.trainer.main import node_name
from launcher.trainer.metrics import MetricsWriter
from launcher.trainer.proof import prove_isolation
from launcher.trainer.rehearsal import rehearse, tell
from launcher.trainer.replicas import Replicas
from launcher.trainer.reports import Figures, Reports
from launcher.trainer.rows import Prefetch
from launcher.trainer.saving import Saver
from launcher.trainer.stream import open_stream
from launcher.trainer.trackers import open_trackers
from launcher.versions import of_training

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.distributed import Ranks


def assemble(
    run: RunDirectory,
    recipe: Recipe,
    *,
    attempt: int,
    ranks: Ranks,
    device: torch.device,
    stop_asked: Callable[[], bool],
) -> Training:
    """Everything up to the first step; collective.

    Raises:
        UserError: something of the recipe does not fit the model, the data or this machine.
    """
    from launcher.run.ledger import valid_checkpoints
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.checkpoint.mirroring import open_mirror

    data = read_data(run)
    fill = _fill(recipe, [ref.path for ref in valid_checkpoints(run)])
    engine: Any
    engine, backend, base = build_engine(recipe, data, ranks=ranks, device=device, fill=fill)
    manager = CheckpointManager(
        run, attempt=attempt, rank=ranks.rank, world_size=ranks.world_size, keep_last=recipe.checkpoint.keep_last,
        keep_every_steps=recipe.checkpoint.keep_every_steps, asynchronous=recipe.checkpoint.async_save,
        meta={
            "run_id": run.read_json("run.json")["run_id"], "engine": recipe.strategy.kind,
            "optimizer": recipe.optimizer.kind, "versions": of_training(),
            "schedule_steps": recipe.optimizer.schedule_steps or int(data["total_steps"]),
        },
        mirror=lambda: open_mirror(run, recipe.checkpoint),
    )  # fmt: skip
    given = frozen.frozen_names(engine.module) if fill == "frozen" else set()
    # None without checkpoints; raises when there are some and none is sound
    state = manager.load_latest(engine, given=given)
    if recipe.adapter.kind != "full":
        opened = run.checkpoints / manager.loaded if manager.loaded else None
        manager.meta["base"] = frozen.same_base(opened, base)
    if state is not None:
        engine.load_trainer_state(state)
    step = int(state["step"]) if state else 0
    if manager.loaded is not None:
        _require_rate(recipe, run.checkpoints / manager.loaded, step=step, total_steps=int(data["total_steps"]))
    prove_isolation(engine, backend=backend, vocab_size=data["vocab_size"], compiled=recipe.model.compile)
    if ranks.rank == 0:
        print(f"{'resumed at' if state else 'begins at'} step {step} of {data['total_steps']}", flush=True)
        if manager.loaded is not None:
            _say_other_ranks(run.checkpoints / manager.loaded, manager, ranks)
    guards = Guards.of(recipe.train)
    if state is not None:
        guards.load(state.get("guards", {}))
    rows = _rows(run, recipe, data, manager, ranks=ranks, device=device, backend=backend, step=step)
    if state is None and recipe.checkpoint.rehearse:
        _rehearse(run, manager, engine, rows)
    return Training(
        recipe=recipe, run=run, attempt=attempt, ranks=ranks, engine=engine, rows=rows,
        eval_sets={entry["name"]: Store.open(entry["store"]) for entry in (data["eval"] or {"sets": []})["sets"]},
        backend=backend,
        reports=_reports(run, recipe, data, engine, guards, attempt=attempt, ranks=ranks, step=step),
        saver=Saver(
            manager, engine, recipe.checkpoint, step=step if state else None, rank=ranks.rank,
            lanes_behind=rows.lanes_behind, guards=guards, interval=_interval(run, recipe) if ranks.rank == 0 else None,
        ),
        replicas=Replicas(engine, every_steps=recipe.train.replica_check_steps, node=node_name()),
        left_out=_left_out(run, ranks=ranks, step=step),
        stop_asked=stop_asked, total_steps=int(data["total_steps"]), step=step,
    )  # fmt: skip


def _interval(run: RunDirectory, recipe: Recipe) -> SaveInterval | None:
    """The time between saves, where it is chosen here; from what the rehearsal of this run has cost."""
    if recipe.checkpoint.every_steps != "auto" or recipe.checkpoint.mttf_hours is None:
        return None
    found = read_rehearsal(run)
    cost = None if found is None else SaveCost(found.blocked_s, found.durable_s)
    lead = stop_lead_s(recipe.cluster)
    return SaveInterval(mttf_s=3600 * recipe.checkpoint.mttf_hours, lead_s=lead, cost=cost)


def _require_rate(recipe: Recipe, checkpoint: Path, *, step: int, total_steps: int) -> None:
    """Raises UserError where the rate would jump unsaid; the launcher asks before, wherever it knows the lengths."""
    before = read_manifest(checkpoint).get("schedule_steps")
    if before is not None and (moved := jump(recipe.optimizer, step, old_steps=before, new_steps=total_steps)):
        raise UserError(moved.choice(f"steps of the run: {before} -> {total_steps}"))


def _rehearse(run: RunDirectory, manager: CheckpointManager, engine: Any, rows: Prefetch) -> None:
    """Before the first step of a run, a save that cannot work fails now."""
    given = frozen.frozen_names(engine.module)
    try:
        found = rehearse(run, manager, engine, given=given, lanes=rows.lanes_behind)
    except BaseException:
        rows.close(failed=True)
        raise
    if manager.rank == 0:
        tell(run, found)


def _say_other_ranks(folder: Path, manager: CheckpointManager, ranks: Ranks) -> None:
    """Whatever is random in a step follows (seed, step, rank), so other ranks draw other numbers: never in silence."""
    wrote = read_manifest(folder, run_id=manager.meta["run_id"])["world_size"]
    if wrote != ranks.world_size:
        print(
            f"{wrote} rank{'s' * (wrote != 1)} wrote this checkpoint, {ranks.world_size} go on from it: the same rows "
            "in the same order; dropout and the like draw other numbers, keyed by seed, step and rank",
            flush=True,
        )


def _left_out(run: RunDirectory, *, ranks: Ranks, step: int) -> dict[int, LeftOut]:
    """The global batches that this attempt leaves out, as rank 0 reads them; collective."""
    box: list[Any] = [left_out(run) if ranks.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    found: dict[int, LeftOut] = {at: batch for at, batch in box[0].items() if at > step}
    if found and ranks.rank == 0:
        steps = ", ".join(map(str, found))
        print(f"left out: the global batches of the steps {steps}, see {run.left_out_file.name}", flush=True)
    return found


def _fill(recipe: Recipe, checkpoints: list[Path]) -> engines.Fill:
    """What the base model must give: everything at the beginning, later only what the checkpoints may not hold."""
    if not checkpoints:
        return "all"
    if recipe.adapter.kind == "full":
        return "none"
    return "none" if recipe.checkpoint.store_frozen and all(map(frozen.holds_frozen, checkpoints)) else "frozen"


def read_data(run: RunDirectory) -> dict[str, Any]:
    """What `prepare` wrote.

    Raises:
        UserError: it has not run, or another version of it has.
    """
    try:
        data: dict[str, Any] = json.loads(run.data_file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{run.data_file}: missing, so the data is not prepared. Run `launcher run`, which prepares it."
        ) from None
    require_current(run, data)
    return data


def build_engine(
    recipe: Recipe, data: dict[str, Any], *, ranks: Ranks, device: torch.device, fill: engines.Fill
) -> tuple[engines.Engine, str, dict[str, Any]]:
    """(engine, attention back end, what is known of frozen weights); what `fill` leaves out has undefined values."""
    precision = engines.choose_precision(recipe.train.precision, recipe.model.dtype, device)
    skeleton = model.build_for(
        recipe.model, device=device, compute=precision.compute, objective_kind=recipe.objective.kind,
        adapter=recipe.adapter,
    )  # fmt: skip
    model.check_vocabulary(skeleton.config, data_vocab_size=data["vocab_size"])
    weights = None
    if ranks.rank == 0:
        parameters = sum(p.numel() for p in skeleton.module.parameters())
        print(f"model: {skeleton.config.model_type}, {parameters:,} parameters, {ranks.world_size} x {device.type}")
        compute = str(precision.compute).removeprefix("torch.")
        other = other_precision(recipe, precision.name, os.environ)
        for note in (f"precision: {compute} ({precision.reason})", other, *skeleton.notes):
            if note:
                print(note, flush=True)
        if fill != "none":
            weights = model.read_weights(recipe.model, skeleton.config, seed=recipe.train.seed, adapter=recipe.adapter)
    base = frozen.describe(recipe, skeleton, weights) if recipe.adapter.kind != "full" else {}
    engine = engines.build(recipe, skeleton.module, device=device, precision=precision, weights=weights, fill=fill)
    return engine, skeleton.backend, base


def _rows(
    run: RunDirectory,
    recipe: Recipe,
    data: dict[str, Any],
    manager: CheckpointManager,
    *,
    ranks: Ranks,
    device: torch.device,
    backend: str,
    step: int,
) -> Prefetch:
    """The rows of prepared stores, or of a stream, from `step` on."""
    total, objective = int(data["total_steps"]), objectives.get(recipe.objective.kind)
    if data["train"].get("streaming"):
        stream = open_stream(recipe, data["train"], manager, ranks=ranks, first=step, last=total)
        return Prefetch(stream, objective, backend=backend, device=device, first=step, last=total)
    batches = Batches(
        Mix.open(data["train"]), seed=recipe.train.seed, global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size, world_size=ranks.world_size, rank=ranks.rank, total_steps=total,
        total_rows=data.get("total_rows"), cost=_row_cost(run), lockstep=recipe.strategy.kind not in ("ddp", "zero1"),
        by_length=recipe.data.packing == "none",
    )  # fmt: skip
    return Prefetch(batches, objective, backend=backend, device=device, first=step, last=total)


def _row_cost(run: RunDirectory) -> tuple[float, float]:
    """As the plan counts it, which is one file for all ranks: whoever counts otherwise would deal otherwise."""
    return row_cost(run.read_json(run.plan_file.name)) or USUAL_COST


def _reports(
    run: RunDirectory, recipe: Recipe, data: dict[str, Any], engine: Any, guards: Guards, *, attempt: int, ranks: Ranks,
    step: int,
) -> Reports:  # fmt: skip
    figures = None
    if ranks.rank == 0:
        figures = Figures(
            metrics=MetricsWriter(run.metrics_file),
            trackers=open_trackers(list(recipe.logging.trackers), run.path, step=step),
            module=engine.module, device=engine.device, world_size=ranks.world_size, attempt=attempt,
            every=recipe.logging.every_steps, total_steps=int(data["total_steps"]),
            sources=[source["name"] for source in data["train"]["sources"]],
        )  # fmt: skip
    return Reports(figures, device=engine.device, guards=guards)
