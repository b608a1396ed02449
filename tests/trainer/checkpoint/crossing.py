"""Checkpoints of every strategy and rank count, opened by every other: what the ranks of the matrix tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer import objectives
from launcher.trainer.checkpoint.manager import CheckpointManager
from tests.trainer import make
from tests.trainer.checkpoint import training

SAVED, STEPS = 2, 4  # updates before the save, and in all
# 4 ranks: a matrix of 6 rows and biases of 6 elements leave the last rank nothing; 97 and 13 divide by none of 2, 3, 4
ODD: dict[str, Any] = {
    "model_type": "llama", "vocab_size": make.VOCAB, "hidden_size": 24, "intermediate_size": 13, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.1,
    "attention_bias": True,
}  # fmt: skip
BOTH = {"strategy__offload__params": "cpu", "strategy__offload__optimizer": "cpu"}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "hsdp": ("fsdp2", {}),  # how many replicas follows from the ranks
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),  # weights this small stay whole on each rank
    "zero3-offload": ("zero3", {"strategy__zero__param_persistence_threshold": 0, **BOTH}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2-gathered": ("fsdp2", {"strategy__reshard_after_forward": False}),
    "fsdp2-offload": ("fsdp2", BOTH),
    "zero2-offload": ("zero2", {"strategy__offload__optimizer": "cpu"}),
    "zero2-round-robin": ("zero2", {"strategy__deepspeed": {"zero_optimization": {"round_robin_gradients": True}}}),
    "zero3-sub-groups": (
        "zero3", {"strategy__zero__sub_group_size": 3000, "strategy__zero__param_persistence_threshold": 100}
    ),
}  # fmt: skip
LORA = {
    "adapter__kind": "lora", "adapter__rank": 3, "adapter__targets": ["q_proj", "down_proj"],
    "config": {**ODD, "tie_word_embeddings": True},
}  # fmt: skip
FLAVOURS: dict[str, dict[str, Any]] = {
    "fp32": {"config": ODD},
    "bf16": {"config": ODD, "train__precision": "bf16"},
    "tied": {"config": {**ODD, "tie_word_embeddings": True}},
    "lora": LORA,
    "lora-stored": {**LORA, "checkpoint__store_frozen": True},
}


def recipe(strategy: str, flavour: str, world_size: int) -> Any:
    """The recipe of a strategy, with what makes the flavour."""
    kind, words = {**STRATEGIES, **MORE}[strategy]
    if strategy == "hsdp":
        shard = 2 if world_size % 2 == 0 and world_size > 2 else 1
        words = {"strategy__replicate": world_size // shard, "strategy__shard": shard}
    return make.make_recipe(kind, **{**FLAVOURS[flavour], **words})


def label(strategy: str, flavour: str, world_size: int) -> str:
    """Name of the run directory that holds the checkpoint."""
    return f"{strategy}-{flavour}-{world_size}"


def begin_all(folder: Path, labels: list[str]) -> None:
    """A new attempt of each of these runs; called before the ranks start."""
    for name in labels:
        ledger.start_attempt(RunDirectory(folder / name), target="test", job_id=None, nodes=["here"], reason="test")


def save_all(rank: int, world_size: int, folder: Path, cases: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Train each case without a stop, saving while training goes on; what it held then, and the losses after it."""
    found = {}
    for strategy, flavour in cases:
        words, name = recipe(strategy, flavour, world_size), label(strategy, flavour, world_size)
        engine, backend = make.make_engine(words, rank=rank)
        manager, now = _manager(folder / name, rank, world_size), {}
        data = make.batches(folder / "packed", words, rank=rank, world_size=world_size, total_steps=STEPS)
        losses = []
        for step in range(STEPS):
            losses.append(_step(engine, data.step(step), backend, world_size))
            if step + 1 == SAVED:
                manager.save(SAVED, engine, {"step": SAVED, **engine.trainer_state()})
                if "round-robin" not in strategy:  # there DeepSpeed's accessors show other parameters' data
                    now = training.truth(engine)
        status = manager.wait()
        assert status.state == "done", status
        found[name] = {"truth": now, "losses": losses[SAVED:], "bytes": status.bytes}
    return found


def load_all(
    rank: int, world_size: int, folder: Path, strategy: str, flavour: str, labels: list[str]
) -> dict[str, dict[str, Any]]:
    """Open each of these checkpoints with one engine, one after the other; what it then holds, and the next losses.

    The engine is new for the first; for the others it has trained and evaluated.
    """
    words = recipe(strategy, flavour, world_size)
    lora = words.adapter.kind == "lora" and not words.checkpoint.store_frozen
    engine, backend = make.make_engine(words, rank=rank, fill="frozen" if lora else "none")
    data = make.batches(folder / "packed", words, rank=rank, world_size=world_size, total_steps=STEPS)
    found = {}
    for name in labels:
        manager = _manager(folder / name, rank, world_size)
        state = manager.load_latest(engine)
        assert state is not None
        assert not manager.problems
        engine.load_trainer_state(state)
        held = training.truth(engine) if "round-robin" not in strategy else {}
        engine.refresh()  # `truth` may have put what lay gathered back into its shards
        losses = [_step(engine, data.step(step), backend, world_size) for step in range(SAVED, STEPS)]
        engine.evaluate(objectives.to_batch(data.step(0).micro[0], backend=backend))
        found[name] = {"truth": held, "losses": losses}
    return found


def _manager(path: Path, rank: int, world_size: int) -> CheckpointManager:
    run = RunDirectory(path)
    return CheckpointManager(
        run, attempt=ledger.latest_attempt(run), rank=rank, world_size=world_size, meta={"run_id": "this-run"}
    )


def _step(engine: Any, batch: Any, backend: str, world_size: int) -> float:
    """One update; the loss over all ranks."""
    loss = make.forward_backward(engine, batch, world_size=world_size, backend=backend)
    dist.all_reduce(loss)
    engine.clip_and_step(1e-3, 1.0)
    return float(loss)
