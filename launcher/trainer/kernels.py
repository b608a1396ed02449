"""Whether Liger's fused kernels are used, and why; the one seam of kernels beside attention."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from launcher.errors import UserError


@dataclass(frozen=True, slots=True)
class Kernels:
    """The decision and its reason.

    liger: Liger's norms, rotary embedding, MLP and fused linear cross entropy replace those of transformers
    reason: one clause for the log
    """

    liger: bool
    reason: str


def choose(requested: Literal["auto", True, False], device: torch.device, model_type: str) -> Kernels:
    """Decide before a model is built: Liger patches without complaint anywhere and then fails in the first forward.

    Raises:
        UserError: `model.liger: true` where it cannot be.
    """
    if requested is False:
        return Kernels(False, "switched off in the recipe")
    problem = _problem(device, model_type)
    if problem is None:
        return Kernels(True, f"a GPU, and {model_type} is supported")
    if requested is True:
        raise UserError(f"model.liger = true: {problem}. Use model.liger=auto, which does without it here.")
    return Kernels(False, problem)


def apply(model: Any) -> None:
    """Put Liger's kernels into a built model; the head stays ours, which calls Liger's fused loss itself."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


def fused_nll_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Sum of the tokens' negative log likelihoods by Liger's fused linear cross entropy.

    Liger 0.8 counts the targets on the host, which waits for the device once a micro-batch.

    Args:
        hidden: [tokens, hidden_size]; weight: [vocab, hidden_size]; targets: [tokens] int64
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap, accum_dtype=torch.float32)
    return loss(weight, hidden.to(weight.dtype), targets, bias)


def _problem(device: torch.device, model_type: str) -> str | None:
    if device.type != "cuda":
        return f"its kernels need a GPU, this rank uses the {device.type.upper()}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'train-launcher[gpu]')"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has nothing for model_type {model_type}"
    return None
