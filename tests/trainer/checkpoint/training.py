"""Some steps on real engines, as the loop takes them, with every figure written down: what tests of L4 and L5 run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer import objectives
from launcher.trainer.checkpoint.manager import CheckpointManager
from launcher.trainer.model import hugging_face_name, persistent_buffers
from tests.trainer import make


def truth(engine: Any) -> dict[str, str]:
    """Hash of every weight, moment and step, gathered whole by the library's own means, not by pieces; collective."""
    engine.ensure_state()
    whole = _whole_of_zero(engine) if hasattr(engine, "zero") else _whole_of_torch(engine)
    found = {}
    for name, kind, tensor in whole:
        found[f"{hugging_face_name(name)} {kind}"] = digest(tensor)
    for name, buffer in persistent_buffers(engine.module):
        found[f"{hugging_face_name(name)} value"] = str(buffer.tolist())
    return found


def digest(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    return xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _whole_of_torch(engine: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, p in engine.module.named_parameters():
        yield name, "value", make.whole(p)
        if p.requires_grad:
            state = engine.optimizer.state[p]
            yield from ((name, kind, make.whole(state[kind])) for kind in ("exp_avg", "exp_avg_sq"))
            yield name, "step", torch.tensor(float(state["step"]))


def _whole_of_zero(engine: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """By DeepSpeed's accessors, which is also a proof that the copies read by the forward pass are not stale."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.zero
    if engine.stage < 3:  # links moments of all groups but the first, which DeepSpeed forgets
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    (step,) = {float(zero.optimizer.state[flat]["step"]) for flat in engine.flats()}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=engine.stage == 3):
            low = p.detach().clone()
        if not p.requires_grad:
            yield name, "value", low
            continue
        value = safe_get_full_fp32_param(p).detach().clone()
        assert torch.equal(low, value.to(low.dtype)), f"{name}: the copy that the forward pass reads is stale"
        yield name, "value", value
        yield from ((name, k, safe_get_full_optimizer_state(p, k).clone()) for k in ("exp_avg", "exp_avg_sq"))
        yield name, "step", torch.tensor(step)


def train(
    rank: int, world_size: int, path: Path, kind: str, to_step: int, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Load the newest checkpoint, train up to `to_step`, save after each step.

    Returns:
        start: step that was loaded, 0 without one
        loaded, final: `truth` after loading and at the end
        rows: row ids of each step's global batch; losses: of each step over all ranks, as hex
        bytes: size of this rank's file in the last checkpoint
    """
    run = RunDirectory(path)
    recipe = make.make_recipe(kind, **(changes or {}))
    manager = CheckpointManager(
        run, attempt=ledger.latest_attempt(run), rank=rank, world_size=world_size, meta={"run_id": "this-run"}
    )
    resuming = bool(ledger.valid_checkpoints(run))
    engine, backend = make.make_engine(recipe, rank=rank, fill="none" if resuming else "all")
    state = manager.load_latest(engine)
    if state is not None:
        engine.load_trainer_state(state)
    start = state["step"] if state else 0
    loaded = truth(engine)
    data = make.batches(path / "packed", recipe, rank=rank, world_size=world_size, total_steps=to_step)
    result: dict[str, Any] = {"start": start, "loaded": loaded, "rows": {}, "losses": {}, "problems": manager.problems}
    if rank == 0:
        (path / f"loaded-a{manager.attempt}").touch()
    for step in range(start, to_step):
        batch = data.step(step)
        loss = make.forward_backward(engine, batch, world_size=world_size, backend=backend)
        dist.all_reduce(loss)
        engine.clip_and_step(1e-3, 1.0)
        engine.evaluate(objectives.to_batch(batch.micro[0], backend=backend))  # may leave gathered parameters behind
        result["rows"][step], result["losses"][step] = batch.rows.tolist(), float(loss).hex()
        if rank == 0:
            with open(path / "losses.jsonl", "a") as file:
                file.write(json.dumps([step, batch.rows.tolist(), float(loss).hex()]) + "\n")
        manager.save(step + 1, engine, {"step": step + 1, **engine.trainer_state()})
    status = manager.wait()
    assert status.state in ("done", "idle"), status
    return {**result, "final": truth(engine), "bytes": status.bytes}
