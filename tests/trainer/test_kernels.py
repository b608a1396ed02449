"""Liger's kernels: when they are used, which are kept, what is said; the kernels themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from launcher.errors import UserError
from launcher.trainer import engines, kernels, model, objectives
from launcher.trainer.main import set_tf32
from launcher.trainer.objectives.chunked import Head
from tests.trainer import make

CPU = torch.device("cpu")
ON = kernels.Kernels(True, "asked for", False, CPU)


def bind(module: Any, forward: Any) -> None:
    """As Liger patches an instance."""
    module.forward = MethodType(forward, module)
    module._get_name = MethodType(lambda self: "LigerSomething", module)


def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    variance = hidden.float().pow(2).mean(-1, keepdim=True)
    return (hidden.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden.dtype) * self.weight


def swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Whatever the config's activation is, as Liger's."""
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary_of_one_row(q: Any, k: Any, cos: Any, sin: Any, *rest: Any) -> Any:
    return rotary(q, k, cos[:1], sin[:1])


class FusedLoss:
    """Sums are all that is asked of it."""

    def __init__(self, *, reduction: str, softcap: float | None, accum_dtype: torch.dtype) -> None:
        assert (reduction, accum_dtype) == ("sum", torch.float32)
        self.softcap = softcap

    def __call__(self, weight: Any, hidden: Any, targets: Any, bias: Any) -> Any:
        logits = functional.linear(hidden, weight, bias).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return functional.cross_entropy(logits, targets, reduction="sum")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package of Liger's shape whose kernels are plain torch; tests exchange them for wrong ones."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after
    chosen = SimpleNamespace(norm=norm, swiglu=swiglu, rotary=rotary)

    def patch(lm: Any, **switches: bool) -> None:
        assert switches == {"fused_linear_cross_entropy": False, "cross_entropy": False}
        modeling_llama.apply_rotary_pos_emb = chosen.rotary
        modeling_llama.LlamaRMSNorm = object
        for block in lm.model.layers:
            bind(block.input_layernorm, chosen.norm)
            bind(block.mlp, chosen.swiglu)

    package = ModuleType("liger_kernel")
    package.transformers = ModuleType("liger_kernel.transformers")  # type: ignore[attr-defined]
    package.transformers._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)  # type: ignore[attr-defined]
    loss = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=FusedLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_cross_entropy", loss)
    chosen.loss = loss
    return chosen


def language_model(**changes: Any) -> Any:
    """As `build_skeleton` has it: parameters on the meta device."""
    recipe = make.make_recipe(config={**make.LLAMA, **changes})
    config = model.load_config(recipe.model)
    with model.parameters_on_meta():
        return model._from_config(recipe.model, config, "sdpa")


def test_liger_is_off_on_a_cpu_and_asking_for_it_is_refused() -> None:
    assert not kernels.choose("auto", CPU, "llama").liger
    assert not kernels.choose(False, CPU, "llama").liger
    with pytest.raises(UserError, match=r"model\.liger = true: its kernels need a GPU"):
        kernels.choose(True, CPU, "llama")


def test_liger_is_refused_for_an_architecture_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    gpu = torch.device("cuda")
    assert kernels.choose("auto", gpu, "llama").liger
    assert "nothing for model_type gpt2" in kernels.choose("auto", gpu, "gpt2").reason
    with pytest.raises(UserError, match=r"model\.liger = true: .*gpt2.*Use model\.liger=auto"):
        kernels.choose(True, gpu, "gpt2")


def test_liger_without_its_package_says_what_to_install() -> None:
    if kernels.importlib.util.find_spec("liger_kernel") and kernels.importlib.util.find_spec("triton"):
        pytest.skip("liger-kernel and triton are installed")
    assert "is not installed (pip install" in kernels.choose("auto", torch.device("cuda"), "llama").reason


def test_kernels_that_compute_the_same_are_kept_and_counted(liger: SimpleNamespace) -> None:
    from transformers.models.llama import modeling_llama

    lm, norms = language_model(), modeling_llama.LlamaRMSNorm
    assert kernels.apply(lm, ON) == ("LlamaMLP x 2, LlamaRMSNorm x 2, rotary embedding", True)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert modeling_llama.LlamaRMSNorm is norms, "another model of this process would be patched, too"
    assert lm.model.layers[0].mlp.forward.__func__ is swiglu
    assert all(p.is_meta for p in lm.parameters())


def test_a_kernel_that_ignores_the_activation_is_left_out(liger: SimpleNamespace) -> None:
    lm = language_model(hidden_act="gelu")
    said, _ = kernels.apply(lm, ON)
    assert said.startswith("LlamaRMSNorm x 2, rotary embedding; left out: LlamaMLP: values differ by")
    assert "forward" not in vars(lm.model.layers[0].mlp)


def test_required_kernels_that_do_not_fit_are_an_error(liger: SimpleNamespace) -> None:
    required = kernels.Kernels(True, "", True, CPU)
    with pytest.raises(UserError, match=r"model\.liger = true: .*LlamaMLP: values differ.*Use model\.liger=auto"):
        kernels.apply(language_model(hidden_act="gelu"), required)


def test_a_wrong_gradient_and_a_wrong_rotary_embedding_are_left_out(liger: SimpleNamespace) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    liger.norm = lambda self, hidden: norm(self, hidden.detach()) + 0 * hidden
    liger.rotary = rotary_of_one_row
    said, _ = kernels.apply(language_model(), ON)
    assert "LlamaRMSNorm: gradients differ" in said
    assert "rotary embedding: values differ" in said
    assert modeling_llama.apply_rotary_pos_emb is original


def test_a_kernel_that_fails_is_left_out_with_its_error(liger: SimpleNamespace) -> None:
    def fails(self: Any, x: Any) -> Any:
        raise RuntimeError("0 active drivers")

    liger.swiglu = fails
    said, _ = kernels.apply(language_model(), ON)
    assert "LlamaMLP: cannot be compared (RuntimeError: 0 active drivers)" in said


def test_a_fused_loss_that_differs_is_not_used(liger: SimpleNamespace) -> None:
    class Mean(FusedLoss):
        def __call__(self, weight: Any, hidden: Any, targets: Any, bias: Any) -> Any:
            return super().__call__(weight, hidden, targets, bias) / len(targets)

    liger.loss.LigerFusedLinearCrossEntropyLoss = Mean
    said, fused_loss = kernels.apply(language_model(), ON)
    assert "left out: fused loss: values differ" in said
    assert not fused_loss


def test_the_log_says_which_kernels_are_in_and_when_the_loss_is_fused(liger: SimpleNamespace) -> None:
    recipe = make.make_recipe()
    config = model.load_config(recipe.model)
    from launcher.trainer.attention import Attention

    skeleton = model.build_skeleton(
        recipe.model, config, chosen=Attention("sdpa", ""), use=ON, objective=objectives.get("sft")
    )
    assert (
        "liger: true (asked for); LlamaMLP x 2, LlamaRMSNorm x 2, rotary embedding; fused loss where all token "
        "weights are 1"
    ) in skeleton.notes
    assert "scales logits" in kernels.loss_clause(Head(scale=0.5))
    assert "whole logits" in kernels.loss_clause(None)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"uniform": False}, False),
        ({"scale": 0.5}, False),
        ({"hidden": False}, False),
        ({"count": 0}, False),
    ],
)
def test_the_fused_loss_is_used_only_where_it_gives_the_same(changes: dict[str, Any], fits: bool) -> None:
    count = changes.get("count", 3)
    batch: Any = SimpleNamespace(uniform=changes.get("uniform", True), targets=torch.zeros(count, dtype=torch.int64))
    hidden = torch.zeros(count, 4, requires_grad=changes.get("hidden", True))
    assert kernels.fits_fused_loss(batch, hidden, Head(scale=changes.get("scale", 1.0))) == fits


def test_the_fused_loss_gets_weights_of_one_type_under_autocast(
    liger: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Loss:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def __call__(self, weight: Any, hidden: Any, targets: Any, bias: Any) -> Any:
            asked.append((weight.dtype, hidden.dtype, torch.is_autocast_enabled("cpu")))
            return functional.cross_entropy(functional.linear(hidden, weight, bias).float(), targets, reduction="sum")

    module = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Loss)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_cross_entropy", module)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kernels.fused_nll_sum(hidden, weight, None, torch.tensor([0, 1, 2]), None).backward()
    assert asked[0] == {"reduction": "sum", "softcap": None, "accum_dtype": torch.float32}
    assert asked[1] == (torch.bfloat16, torch.bfloat16, False)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_tf32_is_set_on_a_gpu_alone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    assert set_tf32(True, CPU) == "tf32: false (train.tf32 changes nothing on the CPU)"
    assert torch.get_float32_matmul_precision() == before
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert set_tf32(True, torch.device("cuda")) == "tf32: true (train.tf32)"
    assert set_tf32(False, torch.device("cuda")) == "tf32: false (train.tf32)"
    assert asked == ["high", "highest"]


@pytest.mark.parametrize(("requested", "dtype"), [("bf16", "fp32"), ("auto", "bf16"), ("bf16", "bf16")])
def test_bf16_on_a_gpu_that_only_emulates_it_is_refused(
    requested: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    with pytest.raises(UserError, match=r"= bf16: expected a GPU with native bf16 .*Tesla T4\. Use model\.dtype=fp32"):
        engines.choose_precision(requested, dtype, gpu)
    assert engines.choose_precision("auto", "fp32", gpu).compute == torch.float32
    assert engines.choose_precision("fp16", "fp32", gpu).compute == torch.float16
