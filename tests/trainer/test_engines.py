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
EXPERTS: dict[str, Any] = {
    "vocab_size": make.VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
MIXTRAL = {**EXPERTS, "model_type": "mixtral", "num_local_experts": 4}
QWEN3_MOE = {**EXPERTS, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24}
SCATTER = "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
LORA = {"adapter__kind": "lora", "adapter__rank": 4}


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
        ("fsdp2", {"strategy__replicate": 2, "strategy__offload__params": "cpu"}),
        ("fsdp2", {"strategy__reshard_after_forward": False}),
        ("fsdp2", {"strategy__reshard_after_forward": False, "strategy__replicate": 2, "strategy__prefetch": 2}),
        ("fsdp2", {"strategy__reshard_after_forward": 2}),
        ("fsdp2", {"strategy__reshard_after_forward": 2, "strategy__prefetch": 1}),
        ("fsdp2", {"model__gradient_checkpointing": "full"}),
        ("ddp", {"model__gradient_checkpointing": "full"}),
    ]
    for _, changes in cases:
        changes["train__global_batch_size"] = 12  # three micro-batches a step
    expected, *others = run_ranks(losses_of_all, 4, store, cases)[0]
    for (kind, changes), got in zip(cases[1:], others, strict=True):
        assert got == pytest.approx(expected, rel=2e-6), (kind, changes)


@pytest.mark.gloo
def test_tied_weights_are_one_parameter_in_every_engine(store: str) -> None:
    one = run_ranks(losses_of_all, 1, store, [("ddp", {"config": TIED})])[0][0]
    for got in run_ranks(losses_of_all, 2, store, [("ddp", {"config": TIED}), ("fsdp2", {"config": TIED})])[0]:
        assert got == pytest.approx(one, rel=2e-6)


@pytest.mark.gloo
@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3_moe"])
def test_models_of_experts_train_alike_in_every_engine(store: str, config: dict[str, Any]) -> None:
    one = run_ranks(losses_of_all, 1, store, [("ddp", {"config": config})])[0][0]
    prefetched = {"config": config, "strategy__prefetch": 1}
    for got in run_ranks(losses_of_all, 2, store, [("ddp", {"config": config}), ("fsdp2", prefetched)])[0]:
        assert got == pytest.approx(one, rel=2e-6)


@pytest.mark.gloo
def test_frozen_and_trained_parameters_of_two_types_share_a_unit(store: str) -> None:
    bf16 = {**LORA, "model__dtype": "bf16"}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ddp", LORA), ("fsdp2", LORA), ("fsdp2", {**LORA, "strategy__replicate": 2, "config": TIED}),
        ("ddp", {**LORA, "config": TIED}), ("ddp", bf16), ("fsdp2", bf16),
    ]  # fmt: skip
    plain, sharded, tied, tied_plain, half, half_sharded = run_ranks(losses_of_all, 2, store, cases)[0]
    assert sharded == pytest.approx(plain, rel=2e-6)
    assert tied == pytest.approx(tied_plain, rel=2e-6)
    assert half_sharded == pytest.approx(half, rel=1e-4)
    assert half == pytest.approx(plain, rel=3e-2)
    assert len(set(plain)) == 4  # it learns


def reduced(rank: int, world_size: int, store: str, kind: str) -> tuple[set[str], bool]:
    """(types in which gradients travelled, whether the mean over ranks is that of fp32) with bf16 weights."""
    recipe = make.make_recipe(kind, model__dtype="bf16", train__global_batch_size=world_size)
    engine, backend = make.make_engine(recipe, rank=rank)
    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size).step(0)
    seen: set[str] = set()
    originals = {name: getattr(torch.distributed, name) for name in ("all_reduce", SCATTER)}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.numel() > 1]
            seen.update(str(t.dtype) for t in tensors)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(torch.distributed, name, watched(name))
    try:
        make.forward_backward(engine, rows, world_size=world_size, backend=backend)
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    together = make.gradients(engine)
    alone = {n: p.detach().clone() for n, p in make.weights_of(engine).items()}
    assert together.keys() == alone.keys()
    return seen, all(g.dtype == torch.bfloat16 for g in together.values())


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_bf16_weights_are_reduced_in_fp32(store: str, kind: str) -> None:
    for seen, kept_as_weights in run_ranks(reduced, 2, store, kind):
        assert seen == {"torch.float32"}
        assert kept_as_weights


def between(rank: int, world_size: int, store: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What an FSDP2 rank holds and sends between two micro-batches of a step, and in the last."""
    recipe = make.make_recipe("fsdp2", train__global_batch_size=3 * world_size, **changes)
    engine, backend = make.make_engine(recipe, rank=rank)
    from launcher.trainer.objectives import to_batch

    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size).step(0)
    micro = [to_batch(m, backend=backend) for m in rows.micro]
    calls: list[str] = []
    originals = {name: getattr(torch.distributed, name) for name in ("all_reduce", SCATTER)}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(torch.distributed, name, watched(name))
    try:
        engine.forward_backward(micro[0], loss_scale=1.0, sync=False)
        gathered = sum(p.numel() for p in engine.module.parameters() if not hasattr(p, "to_local"))
        early = sorted(set(calls))
        calls.clear()
        engine.forward_backward(micro[1], loss_scale=1.0, sync=True)
        late = sorted(set(calls))
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    sharded = all(hasattr(p, "to_local") for p in engine.module.parameters())
    return {"early": early, "late": late, "gathered": gathered > 0, "sharded": sharded}


@pytest.mark.gloo
def test_accumulation_under_hsdp_keeps_shards_and_meets_the_copies_once_a_step(store: str) -> None:
    for seen in run_ranks(between, 4, store, {"strategy__replicate": 2}):
        assert seen == {
            "early": [SCATTER], "late": ["all_reduce", SCATTER],
            "gathered": False, "sharded": True,
        }  # fmt: skip


@pytest.mark.gloo
def test_accumulation_without_resharding_sends_nothing_before_the_last_micro_batch(store: str) -> None:
    for seen in run_ranks(between, 2, store, {"strategy__reshard_after_forward": False}):
        assert seen == {"early": [], "late": [SCATTER], "gathered": True, "sharded": True}


def prefetching(rank: int, world_size: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Blocks that each block gathers ahead, forward and backward; process groups made for `reshard_after_forward`."""
    config = {**make.LLAMA, "num_hidden_layers": 4}
    recipe = make.make_recipe("fsdp2", config=config, strategy__prefetch=2, strategy__reshard_after_forward=2)
    before = torch.distributed.get_pg_count()
    engine, _ = make.make_engine(recipe, rank=rank)
    made = torch.distributed.get_pg_count() - before
    blocks = engine.module.blocks()
    states = [block._get_fsdp_state() for block in blocks]
    ahead = [[states.index(s) for s in state._states_to_forward_prefetch] for state in states]
    behind = [[states.index(s) for s in state._states_to_backward_prefetch] for state in states]
    return ahead, behind, made


@pytest.mark.gloo
def test_prefetch_names_the_next_blocks_and_all_blocks_share_the_groups_they_reshard_to() -> None:
    for ahead, behind, made in run_ranks(prefetching, 4):
        assert ahead == [[1, 2], [2, 3], [3], []]
        assert behind == [[], [0], [1, 0], [2, 1]]
        assert made <= 5  # two axes of two groups, however many blocks


def unused(rank: int, world_size: int, store: str, kind: str) -> str:
    """What an engine says of a trained layer that the forward pass leaves out."""
    recipe = make.make_recipe(kind)
    skeleton = model.build_for(recipe.model, device=CPU, compute=torch.float32, objective_kind="sft")
    with model.parameters_on_meta():
        skeleton.module.lm.model.layers[0].spare = torch.nn.Linear(4, 4, bias=False)
    weights = None
    if rank == 0:
        weights = model.read_weights(recipe.model, skeleton.config, seed=5)
        weights["model.layers.0.spare.weight"] = torch.ones(4, 4)
    precision = engines.choose_precision("auto", "fp32", CPU)
    engine: Any = engines.build(recipe, skeleton.module, device=CPU, precision=precision, weights=weights, fill="all")
    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size)
    try:
        for step in range(2):
            make.forward_backward(engine, rows.step(step), world_size=world_size, backend="sdpa")
            engine.clip_and_step(1e-3, 1.0)
    except UserError as error:
        return str(error)
    spare = make.weights_of(engine)["model.layers.0.spare.weight"]
    return f"fine, and it stays as it was: {bool((spare == 1).all())}"


@pytest.mark.gloo
def test_a_parameter_without_gradient_is_left_alone_by_fsdp2_and_named_by_ddp(store: str) -> None:
    assert run_ranks(unused, 2, store, "fsdp2") == ["fine, and it stays as it was: True"] * 2
    for said in run_ranks(unused, 2, store, "ddp"):
        assert "found none for model.layers.0.spare.weight" in said
        assert "Use strategy.kind=fsdp2" in said


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
        ("fsdp2", {"model__compile": True, "model__gradient_checkpointing": "selective"}),
        ("ddp", {"model__compile": True, "model__gradient_checkpointing": "full"}),
        ("fsdp2", {"model__compile": True, "model__gradient_checkpointing": "offload"}),
    ]
    expected, *others = run_ranks(losses_of_all, 1, store, cases, timeout_s=540)[0]
    for (kind, changes), got in zip(cases[1:], others, strict=True):
        assert got == pytest.approx(expected, rel=1e-5), (kind, changes)
