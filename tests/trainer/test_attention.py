"""Attention: documents of a row do not see each other (L2), what leaks differs, the choice is explained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.batches import MicroBatch
from launcher.data.store import Store
from launcher.errors import UserError
from launcher.trainer import attention, kernels, model, objectives
from tests.trainer import make

CPU = torch.device("cpu")
QWEN = {**make.LLAMA, "model_type": "qwen3", "head_dim": 8}
GEMMA = {**make.LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}


def built(config: dict[str, Any], backend: str, objective: str = "sft") -> model.TrainedModel:
    """A model with weights on one process, no engine around it."""
    recipe = make.make_recipe(config=config)
    recipe.model.attention = backend  # type: ignore[assignment]
    skeleton = model.build_for(recipe.model, device=CPU, compute=torch.float32, objective_kind=objective)
    weights = model.read_weights(recipe.model, skeleton.config, seed=1)
    model.materialise(skeleton.module, CPU)
    for name, parameter in skeleton.module.named_parameters():
        parameter.data.copy_(weights[model.hugging_face_name(name)])
    return skeleton.module


def packed(documents: list[np.ndarray], weights: list[np.ndarray]) -> MicroBatch:
    """One row with these documents and three tokens of padding."""
    ids = np.concatenate([*documents, np.zeros(3, np.int64)])
    positions = np.concatenate([*(np.arange(len(d)) for d in documents), np.arange(3)])
    targets = np.concatenate([*(np.append(d[1:], 0) for d in documents), np.zeros(3, np.int64)])
    trained = np.concatenate([*(np.append(w[1:], 0) for w in weights), np.zeros(3)]).astype(np.float32)
    offsets = np.cumsum([0, *(len(d) for d in documents), 3]).astype(np.int32)
    return MicroBatch(
        ids[None], positions[None], targets[None], trained[None], offsets, int(np.diff(offsets).max()), [0],
        list(range(len(documents))), sum(len(d) for d in documents),
    )  # fmt: skip


@pytest.fixture
def documents(tmp_path: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    store = Store.open(make.documents_store(tmp_path))
    chosen = [d for row in range(3) for d in store.documents(row) if d.weights[1:].any()][:5]
    return [d.tokens.astype(np.int64) for d in chosen], [d.weights for d in chosen]


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [make.LLAMA, QWEN], ids=["llama", "qwen3"])
def test_l2_each_documents_loss_in_a_row_equals_its_loss_alone(
    config: dict[str, Any], backend: str, objective: str, documents: Any
) -> None:
    trained = built(config, backend, objective).eval()
    tokens, weights = documents
    if objective == "pretrain":
        weights = [np.ones_like(w) for w in weights]
    with torch.no_grad():
        for i in range(len(tokens)):
            only = [w if j == i else np.zeros_like(w) for j, w in enumerate(weights)]
            together = trained(objectives.to_batch(packed(tokens, only), backend=backend)).item()
            alone = trained(objectives.to_batch(packed([tokens[i]], [weights[i]]), backend=backend)).item()
            assert together == pytest.approx(alone, rel=2e-6)


def test_l2_holds_with_sliding_windows_and_capped_scores_on_eager(documents: Any) -> None:
    trained = built(GEMMA, "eager").eval()
    tokens, weights = documents
    with torch.no_grad():
        only = [w if j == 2 else np.zeros_like(w) for j, w in enumerate(weights)]
        together = trained(objectives.to_batch(packed(tokens, only), backend="eager")).item()
        alone = trained(objectives.to_batch(packed([tokens[2]], [weights[2]]), backend="eager")).item()
    assert together == pytest.approx(alone, rel=2e-6)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("spoil", ["positions run on", "all-ones mask", "offsets without positions", "4-D mask"])
def test_inputs_that_contaminate_in_silence_do_differ(backend: str, spoil: str, documents: Any) -> None:
    """Without this the equality above could hold because nothing ever differs."""
    lm = built(make.LLAMA, backend).eval().lm
    tokens, weights = documents
    batch = objectives.to_batch(packed(tokens, weights), backend="varlen")  # with offsets
    right = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": None}
    wrong: dict[str, Any] = dict(right)
    if spoil == "positions run on":
        wrong["position_ids"] = torch.arange(batch.input_ids.shape[1])[None]
    elif spoil == "all-ones mask":
        wrong["attention_mask"] = torch.ones_like(batch.input_ids)
    elif spoil == "offsets without positions":
        wrong = {"input_ids": batch.input_ids, **batch.attention}
    else:
        segment = (batch.position_ids[0] == 0).cumsum(0)
        wrong["attention_mask"] = (segment[:, None] == segment[None])[None, None].tril()
    with torch.no_grad():
        a, b = (lm(**inputs, use_cache=False).logits[0, -20:-3] for inputs in (right, wrong))
    if spoil == "4-D mask" and backend == "sdpa":
        torch.testing.assert_close(
            a, b
        )  # sdpa applies it; eager adds it to the scores, which is why nobody may pass one
    else:
        assert (a - b).abs().max() > 1e-2


def test_auto_takes_sdpa_on_the_cpu_and_says_why_not_the_others() -> None:
    chosen = attention.choose("auto", CPU, dtype=torch.float32)
    assert chosen.backend == "sdpa"
    assert "varlen: needs a GPU" in chosen.reason
    assert "flex: has no backward pass on the CPU" in chosen.reason


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "varlen", "flex"])
def test_a_back_end_that_cannot_run_here_is_refused_with_those_that_can(backend: str) -> None:
    with pytest.raises(UserError, match=rf"model\.attention = {backend}: .*Usable here: auto, sdpa, eager"):
        attention.choose(backend, CPU, dtype=torch.float32)


def test_auto_passes_sdpa_over_where_scores_are_capped() -> None:
    config = SimpleNamespace(attn_logit_softcapping=50.0)
    assert attention.choose("auto", CPU, dtype=torch.float32, config=config).backend == "eager"


def test_a_back_end_that_the_model_does_not_support_is_passed_over() -> None:
    old = type("OldForCausalLM", (), {"_supports_sdpa": False})
    chosen = attention.choose("auto", CPU, dtype=torch.float32, model_class=old)
    assert chosen.backend == "eager"
    assert "sdpa: OldForCausalLM does not support it" in chosen.reason


def test_recurrent_layers_are_refused_because_no_back_end_isolates_them() -> None:
    config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    with pytest.raises(UserError, match="linear_attention carry state"):
        attention.choose("auto", CPU, dtype=torch.float32, config=config)


def test_flash_back_ends_get_offsets_and_never_a_mask() -> None:
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = attention.forward_arguments("varlen", cu_seqlens=offsets, max_seqlen=5)
    assert arguments["cu_seq_lens_q"] is offsets
    assert arguments["max_length_k"] == 5
    assert not attention.forward_arguments("sdpa", cu_seqlens=offsets, max_seqlen=5)


def test_liger_is_off_on_a_cpu_and_asking_for_it_is_refused() -> None:
    assert not kernels.choose("auto", CPU, "llama").liger
    assert not kernels.choose(False, CPU, "llama").liger
    with pytest.raises(UserError, match=r"model\.liger = true: its kernels need a GPU"):
        kernels.choose(True, CPU, "llama")
