"""L1: however a global batch is split over ranks, micro-batches, strategies and packing, loss and gradient stay."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer import make

STEPS = 3  # following steps whose losses are compared
OFFLOAD = {"strategy__offload__optimizer": "cpu", "strategy__offload__params": "cpu"}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}), "fsdp2": ("fsdp2", {}), "hsdp": ("fsdp2", {"strategy__replicate": 2}),
    "zero1": ("zero1", {}), "zero2": ("zero2", {}), "zero3": ("zero3", {}), "zero3+offload": ("zero3", OFFLOAD),
}  # fmt: skip
Case = tuple[str, int, str]  # strategy, rows of a micro-batch, layout


def cases(world_size: int) -> list[Case]:
    """Torch's engines with every split; the others with both layouts and both sizes of a micro-batch."""
    own = list(itertools.product(("ddp", "fsdp2"), (1, 2), ("packed", "documents")))
    others = [s for s in STRATEGIES if s not in ("ddp", "fsdp2") and (s != "hsdp" or world_size % 2 == 0)]
    return own + [(strategy, *split) for strategy in others for split in ((1, "packed"), (2, "documents"))]


def measure(
    rank: int, world_size: int, store: str, strategy: str, micro: int, layout: str
) -> tuple[list[float], dict[str, Any]]:
    """Losses of the first steps, and the whole gradient of the first."""
    kind, changes = STRATEGIES[strategy]
    recipe = make.make_recipe(kind, train__micro_batch_size=micro, **changes)
    engine, backend = make.make_engine(recipe, rank=rank)
    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size, layout=layout)
    losses, first = [], {}
    for step in range(1 + STEPS):
        loss = make.forward_backward(engine, rows.step(step), world_size=world_size, backend=backend)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        if step == 0:
            first = make.gradients(engine)
        engine.clip_and_step(1e-3, 1.0)
    return losses, first


def measure_all(rank: int, world_size: int, store: str) -> list[Any]:
    """Every case of this number of ranks in one rank group; gradients from rank 0 alone."""
    out = []
    for strategy, micro, layout in cases(world_size):
        losses, gradient = measure(rank, world_size, store, strategy, micro, layout)
        out.append((losses, {n: g.numpy() for n, g in gradient.items()} if rank == 0 else None))
    return out


@functools.cache
def reference(store: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same batches by plain transformers and torch in one process: whole logits, one document at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = make.make_recipe()
    torch.manual_seed(recipe.train.seed)
    config = {k: v for k, v in make.LLAMA.items() if k != "model_type"}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config), attn_implementation="eager")
    matrices = [p for p in lm.parameters() if p.ndim >= 2]
    others = [p for p in lm.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    rows = make.batches(Path(store), recipe, rank=0, world_size=1)
    losses, first = [], {}
    for step in range(1 + STEPS):
        data = rows.step(step)
        total = 0.0
        for row in data.rows:
            for document in rows.mix.documents(int(row)):
                tokens = torch.tensor(document.tokens.astype("int64"))
                nll = torch.nn.functional.cross_entropy(lm(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
                loss = (nll * torch.tensor(document.weights[1:])).sum() / data.weight
                loss.backward()
                total += loss.item()
        losses.append(total)
        if step == 0:
            first = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make.documents_store(tmp_path_factory.mktemp("store")))


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_l1_every_split_of_a_global_batch_gives_the_same_loss_gradient_and_following_losses(
    world_size: int, store: str
) -> None:
    losses, gradient = reference(store)
    whole_norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradient.values()))
    measured = run_ranks(measure_all, world_size, store)[0]
    for case, (got, grads) in zip(cases(world_size), measured, strict=True):
        assert abs(got[0] / losses[0] - 1) <= 1e-6, (case, got[0], losses[0])
        assert grads.keys() == gradient.keys()
        difference = {n: (torch.from_numpy(grads[n]).double() - gradient[n].double()).norm() for n in gradient}
        total = torch.sqrt(sum(d**2 for d in difference.values()))
        assert total / whole_norm <= 1e-6, (case, float(total / whole_norm))
        for name, d in difference.items():
            assert d / gradient[name].double().norm() <= 5e-6, (case, name, float(d / gradient[name].double().norm()))
        for mine, theirs in zip(got[1:], losses[1:], strict=True):
            assert abs(mine / theirs - 1) <= 1e-5, (case, got, losses)
