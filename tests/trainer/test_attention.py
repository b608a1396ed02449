"""Attention: documents of a row do not see each other (L2), what leaks differs, the choice is explained."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.batches import MicroBatch
from launcher.data.store import Store
from launcher.errors import UserError
from launcher.trainer import attention, attention_kernels, model, objectives
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


@pytest.mark.parametrize("backend", ["flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex"])
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


def per_document(query: Any, key: Any, value: Any, offsets: Any, *, scale: float | None, window: int | None) -> Any:
    """What a variable-length kernel promises: each document alone, causal; [tokens, heads, head_dim]."""
    shared = query.shape[1] // key.shape[1]
    parts = []
    for i, j in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        q, k, v = (t[i:j].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(shared, dim=0) for t in (k, v))
        age = torch.arange(j - i)[:, None] - torch.arange(j - i)[None]
        seen = (age >= 0) & (age < (window or j))
        out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def flash(
    q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """The call that the FlashAttention packages take."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return per_document(q, k, v, cu_seqlens_q, scale=softmax_scale, window=window_size[0] + 1 or None)


def varlen(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn."""
    assert cu_q.dtype == torch.int32
    assert window_size[1] == 0, "not causal"
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert max_q == int(cu_q.diff().max())
    return per_document(q, k, v, cu_q, scale=scale, window=window_size[0] + 1 or None)


@pytest.fixture
def kernels_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that need a GPU, computed by the formula they promise; the paths to them are the real ones."""
    from torch.nn.attention import varlen as torch_varlen
    from transformers import modeling_flash_attention_utils as flash_utils

    process = flash_utils._lazy_define_process_function(flash)
    functions = (None, flash, None, None, None), (process, process)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen)


WINDOWED = {**QWEN, "model_type": "mistral", "sliding_window": 6}


@pytest.mark.usefixtures("kernels_by_formula")
@pytest.mark.parametrize("config", [make.LLAMA, WINDOWED], ids=["llama", "sliding window"])
@pytest.mark.parametrize("backend", ["flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen"])
def test_gpu_back_ends_are_called_so_that_rows_of_several_documents_equal_sdpa(
    backend: str, config: dict[str, Any], documents: Any
) -> None:
    """Everything but the kernel itself is real: two rows, padding, fewer key heads, gradients."""
    trained = built(config, "sdpa")
    tokens, weights = documents
    one, other = packed(tokens[:3], weights[:3]), packed(tokens[2:], weights[2:])
    width = max(one.input_ids.shape[1], other.input_ids.shape[1])
    rows = two_rows(one, other, width)
    results = []
    for name in ("sdpa", backend):
        attention.Attention(name, "").implementation  # noqa: B018 registers ours
        trained.lm.config._attn_implementation = attention.IMPLEMENTATIONS[name]
        trained.zero_grad()
        loss = trained(objectives.to_batch(rows, backend=name))
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in trained.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def two_rows(one: MicroBatch, other: MicroBatch, width: int) -> MicroBatch:
    """A micro-batch of two rows; what a row lacks is one more document of padding."""

    def wide(a: np.ndarray, fill: np.ndarray | None = None) -> np.ndarray:
        lack = width - a.shape[1]
        return np.concatenate([a, (np.zeros(lack) if fill is None else fill[:lack])[None].astype(a.dtype)], axis=1)

    def offsets(m: MicroBatch) -> list[int]:
        ends = m.cu_seqlens[1:].tolist()
        return ends + ([width] if ends[-1] < width else [])

    fields = [
        np.concatenate([wide(getattr(m, name), fill) for m in (one, other)])
        for name, fill in (
            ("input_ids", None), ("position_ids", np.arange(width)), ("targets", None), ("weights", None)
        )
    ]  # fmt: skip
    cu_seqlens = np.array([0, *offsets(one), *(width + end for end in offsets(other))], np.int32)
    return MicroBatch(*fields, cu_seqlens, int(np.diff(cu_seqlens).max()), [0, 1], [], one.tokens + other.tokens)


def test_l2_flex_isolates_documents_on_the_cpu_too_where_it_has_no_backward_pass(documents: Any) -> None:
    trained = built(make.LLAMA, "sdpa").eval()
    tokens, weights = documents
    batch = objectives.to_batch(packed(tokens, weights), backend="flex")
    attention.Attention("flex", "").implementation  # noqa: B018 registers ours
    results = []
    for name in ("sdpa", "flex"):
        trained.lm.config._attn_implementation = attention.IMPLEMENTATIONS[name]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            exact = trained(batch).item()
            with torch.autocast("cpu", torch.bfloat16):  # queries in fp32, values in bf16: refused without our entry
                results.append((exact, trained(batch).item()))
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-2)


@pytest.mark.usefixtures("kernels_by_formula")
@pytest.mark.parametrize("backend", ["flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen"])
def test_a_kernel_that_keeps_its_promise_passes_the_trial(backend: str) -> None:
    shapes = [None, SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)]
    if backend != "flash_attention_4":
        shapes.append(SimpleNamespace(num_attention_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12))
    for config in shapes:
        assert attention_kernels.trial(attention.IMPLEMENTATIONS[backend], CPU, torch.bfloat16, config) is None


def test_a_kernel_that_leaks_or_fails_does_not_pass_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen as torch_varlen

    assert "output differs by" in str(attention_kernels.trial("sdpa", CPU, torch.float32, None))  # it gets no mask
    assert "its kernel fails here" in str(attention_kernels.trial("launcher_varlen", CPU, torch.bfloat16, None))

    @functools.wraps(varlen)
    def half_a_gradient(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        return varlen(q, (k + k.detach()) / 2, v, *rest, **options)

    monkeypatch.setattr(torch_varlen, "varlen_attn", half_a_gradient)
    wrong = attention_kernels.trial("launcher_varlen", CPU, torch.float32, None)
    assert wrong is not None
    assert "its kernel is wrong here (gradient of keys differs by" in wrong


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of compute capability 9.0 without any package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "trial", lambda *_: None)
    monkeypatch.setattr(attention, "_installed", lambda backend: False)
    return torch.device("cuda")


def test_auto_prefers_the_newest_installed_package_and_falls_back_in_order(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def auto(dtype: torch.dtype = torch.bfloat16, **config: Any) -> attention.Attention:
        return attention.choose("auto", hopper, dtype=dtype, config=SimpleNamespace(**config))

    chosen = auto()
    assert chosen.backend == "varlen"
    assert "flash_attention_4: package flash-attn-4 is not installed" in chosen.reason
    monkeypatch.setattr(attention, "_installed", lambda backend: True)
    assert auto().backend == "flash_attention_4"
    assert auto(attention_dropout=0.1).backend == "flash_attention_2"  # newer ones would drop nothing, in silence
    assert auto(torch.float32).backend == "flex"
    assert auto(torch.float32, attention_dropout=0.1).backend == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(attention, "trial", lambda name, *_: "fails" if name == "flash_attention_4" else None)
    chosen = auto()
    assert chosen.backend == "flash_attention_2"
    assert "flash_attention_4: fails" in chosen.reason
    assert "flash_attention_3: needs compute capability 8.0 or newer, below 10.0, this GPU has 10.0" in chosen.reason


def test_a_kernel_that_the_model_does_not_list_is_not_asked_for(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take another one in silence."""
    monkeypatch.setattr(attention, "_installed", lambda backend: True)
    sinks = type("SinksForCausalLM", (), {
        "_supports_flash_attn": True, "_supports_flex_attn": True,
        "_compatible_flash_implementations": ["flash_attention_4"],
    })  # fmt: skip
    assert attention.choose("auto", hopper, dtype=torch.bfloat16, model_class=sinks).backend == "flash_attention_4"
    with pytest.raises(UserError, match=r"SinksForCausalLM does not support it.*flash_attention_4, flex, eager"):
        attention.choose("flash_attention_2", hopper, dtype=torch.bfloat16, model_class=sinks)
