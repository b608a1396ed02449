"""Engines beside the split matrix: precision, tied weights, offload, HSDP, recomputation, shares, counts (L3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.trainer import engines, model
from launcher.trainer.randomness import random_state_key, rekey
from tests.ranks import run_ranks
from tests.trainer import make

CPU = torch.device("cpu")
TIED = {**make.LLAMA, "tie_word_embeddings": True}
DROPOUT = {**make.LLAMA, "attention_dropout": 0.3}


def losses_of(
    rank: int, world_size: int, store: str, kind: str, changes: dict[str, Any], steps: int = 4
) -> list[float]:
    """Losses of the first steps of a changed recipe."""
    config = changes.pop("config", None)
    recipe = make.make_recipe(kind, config=config, **changes)
    engine, backend = make.make_engine(recipe, rank=rank)
    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size)
    out = []
    for step in range(steps):
        rekey(0, step, rank)
        loss = make.forward_backward(engine, rows.step(step), world_size=world_size, backend=backend)
        torch.distributed.all_reduce(loss)
        out.append(loss.item())
        engine.clip_and_step(1e-3, recipe.train.max_grad_norm)
    return out


def losses_of_all(rank: int, world_size: int, store: str, cases: list[tuple[str, dict[str, Any]]]) -> list[list[float]]:
    """Several recipes in one rank group."""
    return [losses_of(rank, world_size, store, kind, dict(changes)) for kind, changes in cases]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make.documents_store(tmp_path_factory.mktemp("store")))


@pytest.mark.gloo
def test_offload_hsdp_recomputation_and_keeping_weights_gathered_change_no_loss(store: str) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {}),
        ("fsdp2", {"strategy__replicate": 2, "strategy__shard": 2}),
        ("fsdp2", {"strategy__offload__params": "cpu", "strategy__offload__optimizer": "cpu"}),
        ("fsdp2", {"strategy__reshard_after_forward": False}),
        ("fsdp2", {"model__gradient_checkpointing": "full"}),
        ("ddp", {"model__gradient_checkpointing": "full"}),
    ]
    expected, *others = run_ranks(losses_of_all, 4, store, cases)[0]
    for (kind, changes), got in zip(cases[1:], others, strict=True):
        assert got == pytest.approx(expected, rel=2e-6), (kind, changes)


@pytest.mark.gloo
def test_tied_weights_are_one_parameter_in_every_engine(store: str) -> None:
    one = run_ranks(losses_of_all, 1, store, [("ddp", {"config": TIED})])[0][0]
    for got in run_ranks(losses_of_all, 2, store, [("ddp", {"config": TIED}), ("fsdp2", {"config": TIED})])[0]:
        assert got == pytest.approx(one, rel=2e-6)


@pytest.mark.gloo
def test_recomputation_draws_the_same_dropout_mask_again(store: str) -> None:
    full = {"config": DROPOUT, "model__gradient_checkpointing": "full"}
    cases: list[tuple[str, dict[str, Any]]] = [("fsdp2", {"config": DROPOUT}), ("fsdp2", full), ("fsdp2", {})]
    plain, again, without = run_ranks(losses_of_all, 2, store, cases)[0]
    assert again == pytest.approx(plain, rel=2e-6)
    assert abs(without[0] / plain[0] - 1) > 1e-4  # there is dropout at all


@pytest.mark.gloo
def test_half_precision_stays_close_to_fp32_and_is_not_fp32(store: str) -> None:
    kinds = [
        (kind, {"train__precision": precision, "train__max_grad_norm": None})
        for precision in ("bf16", "fp16")
        for kind in ("ddp", "fsdp2")
    ]
    pure = ("fsdp2", {"model__dtype": "bf16"})
    exact, *others = run_ranks(losses_of_all, 2, store, [("ddp", {"train__max_grad_norm": None}), *kinds, pure])[0]
    for case, got in zip([*kinds, pure], others, strict=True):
        assert got == pytest.approx(exact, rel=3e-2), case
        assert got != pytest.approx(exact, rel=1e-6), case


def unequal(rank: int, world_size: int, store: str) -> tuple[float, float, float]:
    """(our loss, the loss by micro-batch means, the loss of one process) of a global batch whose counts differ."""
    recipe = make.make_recipe("ddp")
    engine, backend = make.make_engine(recipe, rank=rank)
    data = make.batches(Path(store), recipe, rank=rank, world_size=world_size).step(0)
    from launcher.trainer.objectives import to_batch

    sums = [(engine.evaluate(to_batch(m, backend=backend)), float(m.weights.sum())) for m in data.micro]
    ours = torch.stack([s for s, _ in sums]).sum() / data.weight
    means = torch.stack([s / w for s, w in sums if w]).mean() / world_size
    torch.distributed.all_reduce(ours)
    torch.distributed.all_reduce(means)
    alone = make.batches(Path(store), recipe, rank=0, world_size=1).step(0)
    whole = sum(float(engine.evaluate(to_batch(m, backend=backend))) for m in alone.micro) / alone.weight
    return ours.item(), means.item(), whole


@pytest.mark.gloo
def test_l3_loss_is_normalised_by_the_global_weight_and_a_mean_of_micro_batch_means_would_differ(store: str) -> None:
    for ours, means, whole in run_ranks(unequal, 2, store):
        assert ours == pytest.approx(whole, rel=1e-7)
        assert abs(means / whole - 1) > 1e-3


def shares(rank: int, world_size: int) -> tuple[int, int, int, bool]:
    """(elements this rank holds, elements of the model, largest tensor made while building, buffers are right)."""
    recipe = make.make_recipe("fsdp2")
    seen: list[int] = []
    original = torch.empty

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = original(*args, **kwargs)
        if not made.is_meta:
            seen.append(made.numel())
        return made

    torch.empty = watch
    try:
        engine, _ = make.make_engine(recipe, rank=rank)
    finally:
        torch.empty = original
    held = sum(p.to_local().numel() for p in engine.module.parameters())
    frequencies = engine.module.lm.model.rotary_emb.inv_freq
    expected = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    total = sum(p.numel() for p in engine.module.parameters())
    return held, total, max(seen), bool(torch.allclose(frequencies, expected))


@pytest.mark.gloo
def test_under_fsdp2_a_rank_holds_its_share_alone_and_buffers_that_are_in_no_checkpoint_are_right() -> None:
    results = run_ranks(shares, 3)
    assert sum(held for held, *_ in results) == results[0][1]
    for held, total, largest, buffers in results:
        assert held < 0.45 * total
        assert largest < 0.2 * total
        assert buffers


def initial(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    """First weights by name."""
    engine, _ = make.make_engine(make.make_recipe(kind), rank=rank)
    return {name: tensor.numpy() for name, tensor in make.weights_of(engine).items()}


@pytest.mark.gloo
def test_first_weights_depend_on_the_seed_alone() -> None:
    one = run_ranks(initial, 1, "ddp")[0]
    for world_size, kind in ((2, "fsdp2"), (3, "ddp")):
        for got in run_ranks(initial, world_size, kind):
            assert got.keys() == one.keys()
            assert all((got[name] == one[name]).all() for name in one)


def evaluated_then_pieces(rank: int, world_size: int, store: str) -> list[tuple[str, str, int, int]]:
    """Pieces after an evaluation, when units may still be gathered."""
    recipe = make.make_recipe("fsdp2", strategy__reshard_after_forward=False)
    engine, backend = make.make_engine(recipe, rank=rank)
    data = make.batches(Path(store), recipe, rank=rank, world_size=world_size).step(0)
    from launcher.trainer.objectives import to_batch

    engine.evaluate(to_batch(data.micro[0], backend=backend))
    engine.ensure_state()
    return [(p.name, p.kind, p.start, p.tensor.numel()) for p in engine.pieces()]


@pytest.mark.gloo
def test_pieces_cover_every_value_and_moment_once_also_right_after_an_evaluation(store: str) -> None:
    ranks = run_ranks(evaluated_then_pieces, 3, store)
    recipe = make.make_recipe()
    shapes = {
        n: tuple(t.shape) for n, t in model.read_weights(recipe.model, model.load_config(recipe.model), seed=0).items()
    }
    for name, shape in shapes.items():
        for kind in ("value", "exp_avg", "exp_avg_sq"):
            ranges = sorted((s, n) for pieces in ranks for p, k, s, n in pieces if (p, k) == (name, kind) and n)
            at = 0
            for start, length in ranges:
                assert start == at
                at += length
            assert at == torch.Size(shape).numel()


def test_bf16_weights_take_no_other_precision() -> None:
    assert engines.choose_precision("auto", "bf16", CPU).compute == torch.bfloat16
    with pytest.raises(UserError, match=r"train\.precision = fp32: expected auto or bf16 with model\.dtype=bf16"):
        engines.choose_precision("fp32", "bf16", CPU)


def test_auto_precision_on_a_cpu_is_fp32_and_says_why() -> None:
    chosen = engines.choose_precision("auto", "fp32", CPU)
    assert chosen.compute == torch.float32
    assert "cpu" in chosen.reason


def test_random_streams_differ_between_seeds_steps_and_ranks_and_repeat_for_the_same() -> None:
    keys = {random_state_key(s, t, r) for s in range(5) for t in range(20) for r in range(5)}
    assert len(keys) == 500
    rekey(1, 2, 3)
    first = torch.rand(3)
    rekey(1, 2, 3)
    assert torch.equal(torch.rand(3), first)
    rekey(1, 3, 3)
    assert not torch.equal(torch.rand(3), first)


@pytest.mark.gloo
@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_the_isolation_proof_runs_them_uncompiled(store: str) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {}),
        ("ddp", {"model__compile": True}),
        ("fsdp2", {"model__compile": True}),
        ("fsdp2", {"model__compile": True, "model__gradient_checkpointing": "full"}),
    ]
    expected, *others = run_ranks(losses_of_all, 1, store, cases, timeout_s=540)[0]
    for (kind, changes), got in zip(cases[1:], others, strict=True):
        assert got == pytest.approx(expected, rel=1e-5), (kind, changes)
