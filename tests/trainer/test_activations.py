"""Recomputation: equal gradients in every mode, dropout included; what is kept; what is computed twice."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.errors import UserError
from launcher.trainer import activations, model
from launcher.trainer.model import hugging_face_name
from tests.ranks import run_ranks
from tests.trainer import make

MODES = ("selective", "full", "offload")
DROPOUT = {**make.LLAMA, "attention_dropout": 0.3}
LORA = {"adapter__kind": "lora", "adapter__rank": 4, "adapter__dropout": 0.3}
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": make.VOCAB, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip


def built(mode: str, *, config: dict[str, Any] | None = None, **changes: Any) -> model.TrainedModel:
    """A model with weights, not yet in an engine."""
    recipe = make.make_recipe(config=config, model__gradient_checkpointing=mode, **changes)
    skeleton = model.build_for(
        recipe.model, device=make.CPU, compute=torch.float32, objective_kind="sft", adapter=recipe.adapter
    )
    model.materialise(skeleton.module, make.CPU)
    weights = model.read_weights(recipe.model, skeleton.config, seed=1, adapter=recipe.adapter)
    for name, parameter in skeleton.module.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
        start = weights[hugging_face_name(name)]
        parameter.data.copy_(start if start.any() else noise)  # one of LoRA's matrices begins at zero
    return skeleton.module.train()


class Watch(TorchDispatchMode):
    """Counts operations that are really run, and bytes of what they made that is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls[function.name()] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def kept(self) -> int:
        """Bytes in use."""
        return sum(nbytes for reference, nbytes in self.made.values() if reference() is not None)

    def products(self) -> int:
        """Matrix products so far."""
        return sum(count for name, count in self.calls.items() if name in activations.PRODUCTS)

    def attention(self) -> int:
        """Calls of fused attention so far."""
        return sum(count for name, count in self.calls.items() if name in activations.ATTENTION)


def step(module: model.TrainedModel, watch: Watch | None = None) -> tuple[dict[str, torch.Tensor], Any]:
    """Gradients of one forward and backward; with a watch also (bytes kept between, products, calls of attention)."""
    ids = torch.randint(0, make.VOCAB, (2, 64), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(64).expand(2, 64)
    torch.manual_seed(7)
    seen = None
    if watch is None:
        module.lm(input_ids=ids, position_ids=positions).logits.square().sum().backward()
    else:
        with watch:
            loss = module.lm(input_ids=ids, position_ids=positions).logits.square().sum()
            between = watch.kept()
            loss.backward()
        seen = (between, watch.products(), watch.attention())
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize(
    ("config", "changes"),
    [(None, {}), (DROPOUT, {}), (DROPOUT, LORA), (MIXTRAL, {}), (DROPOUT, {"model__attention": "eager"})],
    ids=["plain", "dropout", "lora and dropout", "experts", "eager"],
)
def test_every_mode_gives_the_gradient_of_none_to_the_bit(
    config: dict[str, Any] | None, changes: dict[str, Any]
) -> None:
    expected, _ = step(built("none", config=config, **changes))
    assert expected
    for mode in MODES:
        got, _ = step(built(mode, config=config, **changes))
        assert got.keys() == expected.keys()  # no wrapper in the names
        for name in expected:
            assert torch.equal(got[name], expected[name]), (mode, name)


def test_selective_keeps_less_than_none_and_repeats_no_product_and_no_attention() -> None:
    deep = {**make.LLAMA, "num_hidden_layers": 4}
    seen = {mode: step(built(mode, config=deep), Watch())[1] for mode in ("none", *MODES)}
    bytes_kept, products, attention = ({mode: figures[i] for mode, figures in seen.items()} for i in range(3))
    assert products["none"] == products["selective"] < products["full"] == products["offload"]
    assert attention["none"] == attention["selective"] == 4
    assert attention["full"] == 8
    assert bytes_kept["full"] < bytes_kept["selective"] < bytes_kept["none"]


def test_attention_with_dropout_is_repeated_for_what_drops_out_after_it_draws_from_the_same_place() -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1, 1, 1, 8)
    keeps = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    assert activations._policy(None, operator, q, q, q) == keeps
    assert activations._policy(None, operator, q, q, q, 0.1) != keeps
    assert activations._policy(None, operator, q, q, q, dropout_p=0.1) != keeps


def test_offload_holds_each_block_s_input_on_the_host_and_lets_go_of_it() -> None:
    module = built("offload", config={**make.LLAMA, "num_hidden_layers": 3})
    copies = module.blocks()[0].forward.copies  # type: ignore[union-attr]
    made: list[activations.HostCopy] = []
    order: list[int] = []
    put, take = copies.put, copies.take

    def watch_put(tensor: torch.Tensor, *, first: bool) -> activations.HostCopy:
        assert tensor.shape == (2, 64, 32)
        made.append(put(tensor, first=first))
        host = made[-1].host
        assert host is not None
        assert host.data_ptr() != tensor.data_ptr()
        return made[-1]

    def watch_take(copy: activations.HostCopy) -> torch.Tensor:
        order.append(made.index(copy))
        tensor = take(copy)
        assert copy.previous is None or copy.previous.back is not None  # the next one is on its way
        return tensor

    copies.put, copies.take = watch_put, watch_take
    ids = torch.zeros(2, 64, dtype=torch.int64)
    positions = torch.arange(64).expand(2, 64)
    for _ in range(2):  # micro-batches
        loss = module.lm(input_ids=ids, position_ids=positions).logits.sum()
        assert [copy.host is not None for copy in made[-3:]] == [True] * 3
        loss.backward()
        assert all(copy.host is None and copy.back is None for copy in made)
    assert order == [2, 1, 0, 5, 4, 3]
    module.eval()
    with torch.no_grad():
        module.lm(input_ids=ids, position_ids=positions)
    assert len(made) == 6


def test_a_model_without_blocks_is_refused() -> None:
    class Flat:
        lm = torch.nn.Linear(2, 2)

        def blocks(self) -> list[torch.nn.Module]:
            return []

    with pytest.raises(UserError, match=r"model\.gradient_checkpointing = full: expected decoder blocks, found none"):
        activations.apply(Flat(), "full")  # type: ignore[arg-type]


def gradients_of(
    rank: int, world_size: int, store: str, cases: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Gradients of a global batch of each recipe."""
    out = []
    for kind, changes in cases:
        recipe = make.make_recipe(kind, **{"config": DROPOUT, **changes})
        engine, backend = make.make_engine(recipe, rank=rank)
        rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size)
        torch.manual_seed(5 + rank)
        make.forward_backward(engine, rows.step(0), world_size=world_size, backend=backend)
        out.append({name: gradient.numpy() for name, gradient in make.gradients(engine).items()})
    return out


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_every_mode_gives_the_gradient_of_none_in_every_engine(kind: str, tmp_path: Path) -> None:
    store = str(make.documents_store(tmp_path))
    half = {"train__precision": "bf16"}
    cases: list[tuple[str, dict[str, Any]]] = [
        (kind, {**more, "model__gradient_checkpointing": mode}) for more in ({}, half) for mode in ("none", *MODES)
    ]
    for got in run_ranks(gradients_of, 2, store, cases):
        for first in (0, 4):
            for case, other in zip(cases[first + 1 :], got[first + 1 : first + 4], strict=False):
                for name, expected in got[first].items():
                    assert other[name] == pytest.approx(expected, rel=1e-6, abs=1e-8), (case, name)
