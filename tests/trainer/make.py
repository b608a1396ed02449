"""What trainer tests share: a tiny recipe, a store of random documents, an engine on it, whole gradients by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from launcher.data.batches import Batches, StepBatch
from launcher.data.packing import pack
from launcher.data.store import Encoded, Index, Store, write_part, write_store
from launcher.recipe.schema import Adapter, Data, Model, Objective, Optimizer, Recipe, Source, Strategy, Train, to_dict
from launcher.run.control import read_outcomes
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt
from launcher.trainer import engines, model, objectives
from launcher.trainer.main import run_rank
from launcher.trainer.model import hugging_face_name
from tests.ranks import run_ranks

VOCAB = 97
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
CPU = torch.device("cpu")


def make_recipe(kind: str = "ddp", *, config: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A small recipe; `changes` as `train__precision="bf16"`."""
    recipe = Recipe(
        model=Model(config=dict(config or LLAMA), tokenizer="none", attention="sdpa"),
        adapter=Adapter(), objective=Objective(), data=Data(train=[Source(path="none")], seq_len=64),
        train=Train(global_batch_size=6, micro_batch_size=1, max_steps=4, max_grad_norm=1.0, seed=5),
        optimizer=Optimizer(lr=1e-3, weight_decay=0.1, schedule="constant"), strategy=Strategy(kind=kind),  # type: ignore[arg-type]
    )  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        target: Any = getattr(recipe, section)
        *path, last = name.split("__")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return recipe


def documents_store(folder: Path, *, count: int = 60, seq_len: int = 64, masked: bool = True) -> Path:
    """Packed documents of unequal lengths; with `masked`, prompts carry no weight and last tokens half of it."""
    rng = np.random.default_rng(11)
    lengths = rng.integers(3, 40, count)
    encoded = Encoded()
    for record, length in enumerate(lengths):
        weights = np.ones(length, np.float32)
        if masked:
            weights[: int(rng.integers(0, length - 1))] = 0
            weights[-1] = 0.5
        encoded.add(rng.integers(1, VOCAB, length).astype(np.uint32), weights, file=0, record=record)
    tokens, path = folder / "tokens", folder / "packed"
    write_part(tokens, encoded, vocab_size=VOCAB)
    write_store(
        path, parts=[tokens], files=["made"], index=Index.gather([tokens]), packings=[pack(lengths, seq_len)],
        seq_len=seq_len, meta={"key": "made", "vocab_size": VOCAB},
    )  # fmt: skip
    return path


def make_engine(
    recipe: Recipe, *, rank: int = 0, fill: engines.Fill = "all", device: torch.device = CPU
) -> tuple[Any, str]:
    """An engine with its weights, and its attention back end; collective over the ranks."""
    precision = engines.choose_precision(recipe.train.precision, recipe.model.dtype, device)
    skeleton = model.build_for(
        recipe.model, device=device, compute=precision.compute, objective_kind=recipe.objective.kind,
        adapter=recipe.adapter,
    )  # fmt: skip
    weights = None
    if fill != "none" and rank == 0:
        weights = model.read_weights(recipe.model, skeleton.config, seed=recipe.train.seed, adapter=recipe.adapter)
    engine = engines.build(recipe, skeleton.module, device=device, precision=precision, weights=weights, fill=fill)
    return engine, skeleton.backend


def batches(
    path: Path, recipe: Recipe, *, rank: int, world_size: int, layout: Any = "packed", total_steps: int = 100
) -> Batches:
    """The batches of one rank."""
    return Batches(
        Store.open(path), seed=recipe.train.seed, global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size, world_size=world_size, rank=rank, total_steps=total_steps,
        layout=layout,
    )  # fmt: skip


def forward_backward(engine: Any, data: StepBatch, *, world_size: int, backend: str = "sdpa") -> torch.Tensor:
    """One global batch's loss and gradient; the loss's share of this rank, 0-d float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i, micro in enumerate(data.micro):
        batch = objectives.to_batch(micro, backend=backend)
        last = i == len(data.micro) - 1
        total += engine.forward_backward(batch, loss_scale=world_size / data.weight, sync=last)
    return total / data.weight


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor behind a shard; collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by Hugging Face name, after the last micro-batch; collective."""
    if hasattr(engine, "zero"):
        return zero_whole(engine, zero_gradients(engine))
    named = engine.module.named_parameters()
    return {hugging_face_name(n): whole(p.grad) for n, p in named if p.grad is not None}


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Whole weights by Hugging Face name, fp32 masters where the engine keeps them; collective."""
    if hasattr(engine, "zero"):
        engine.ensure_state()
        return zero_whole(engine, [engine.buffers(group)["value"] for group in range(len(engine.flats()))])
    engine.reshard()
    return {hugging_face_name(n): whole(p) for n, p in engine.module.named_parameters()}


def zero_gradients(engine: Any) -> list[torch.Tensor]:
    """This rank's averaged gradient of each flat buffer of a ZeRO engine."""
    zero = engine.zero
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):
        return list(zero.fp32_groups_gradient_flat_partition)
    out = []
    for i, flat in enumerate(engine.flats()):
        if flat.grad is not None:  # offloaded
            out.append(flat.grad)
        else:
            parts = [part.reshape(-1) for part in zero.averaged_gradients[i]]
            out.append(torch.cat([*parts, torch.zeros(flat.numel())])[: flat.numel()])
    return out


def zero_whole(engine: Any, flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of a ZeRO engine's trained parameters from its ranks' flat buffers; collective."""
    out = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            shape = getattr(p, "ds_shape", p.shape)
            full = torch.zeros(shape).view(-1)
            if span := engine.span(p):
                group, at, start, length = span
                full[start : start + length] = flats[group][at : at + length]
            torch.distributed.all_reduce(full)
            out[hugging_face_name(name)] = full.view(shape)
    return out


def make_run(folder: Path, recipe: Recipe, *, total_steps: int = 6, evaluation: bool = True) -> RunDirectory:
    """A run directory as the launch side and `prepare` would leave it, over a made store."""
    store = folder / "store"
    path = store / "packed" if store.exists() else documents_store(store)
    opened = Store.open(path)
    run = RunDirectory(folder / "run")
    run.create(to_dict(recipe), {}, {})
    part = {"name": "made", "store": str(path), "rows": opened.rows, "epoch_rows": opened.rows}
    data = {
        "version": 2, "train": {"sources": [part]}, "eval": {"sets": [part]} if evaluation else None,
        "vocab_size": VOCAB, "total_rows": None,
        "global_batch_size": recipe.train.global_batch_size, "total_steps": total_steps,
    }  # fmt: skip
    run.data_file.write_text(json.dumps(data))
    return run


def run_attempt(run: RunDirectory, world_size: int) -> list[Any]:
    """One attempt on so many ranks; what each rank's `run_rank` came to, as (outcome kind, step)."""
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    run_ranks(rank_of_run, world_size, str(run.path), attempt)
    outcomes = read_outcomes(run, attempt)
    return [(outcomes[rank].kind, outcomes[rank].step) for rank in range(world_size)]


def rank_of_run(rank: int, world_size: int, path: str, attempt: int) -> None:
    """What a rank of a test run does."""
    run_rank(path, attempt)
