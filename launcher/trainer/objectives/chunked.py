"""The next-token loss from hidden states, a few tokens at a time, so that a micro-batch's logits never all exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits alive at once. A GPU takes more, because each chunk reads and writes the whole weight gradient.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True, slots=True)
class Head:
    """How logits follow from hidden states beside the linear layer: capped(scale x (hidden W^T + b)).

    scale: factor on the logits (Granite, Cohere)
    softcap: c in c x tanh(logits / c) (Gemma 2); None: no cap
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[tokens, vocab] float32; the product itself in the type of `weight`."""
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def chunk_tokens(vocab: int, device_type: str) -> int:
    """Tokens whose float32 logits fit into the budget; at least one."""
    return max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab))


def weighted_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, head: Head
) -> Tensor:
    """Sum of weight x negative log likelihood.

    The gradients are computed in the forward pass, chunk by chunk, as fused linear cross entropy does
    (Liger Kernel, arXiv:2410.10989), so the backward pass only scales them.

    Args:
        hidden: [n, hidden_size]; weight: [vocab, hidden_size]; bias: [vocab] or None
        targets: [n] int64; weights: [n] float32
    Returns:
        0-d float64.
    """
    compute = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedNll.apply(hidden, weight, bias, targets, weights, head, compute, torch.is_grad_enabled())


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, head: Head,
        compute: torch.dtype, with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        matrix, offset = weight.to(compute), None if bias is None else bias.to(compute)
        need = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if need[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need[2] else None
        step = chunk_tokens(weight.shape[0], hidden.device.type)
        for at in range(0, hidden.shape[0], step):
            part = slice(at, at + step)
            states = hidden[part].to(compute)
            logits = head.logits(states, matrix, offset)
            slope = None if head.softcap is None or not any(need) else 1 - (logits / head.softcap) ** 2
            # relative to the largest logit: what is left of a likely token's probability is not rounded at logit size
            logits -= logits.amax(dim=-1, keepdim=True)
            hit = logits.gather(1, targets[part, None])[:, 0]
            exponentials = logits.exp_()
            normaliser = exponentials.sum(dim=-1)
            total += ((normaliser.log() - hit) * weights[part]).sum(dtype=torch.float64)
            if not any(need):
                continue
            grad = _logits_gradient(exponentials, normaliser, targets[part], weights[part], slope)
            grad = (grad if head.scale == 1.0 else grad.mul_(head.scale)).to(compute)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, grad, states)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grads[0].float()
        scaled = [None if g is None else (g * scale).to(g.dtype) for g in (grad_hidden, grad_weight, grad_bias)]
        return (*scaled, None, None, None, None, None)


def _logits_gradient(
    exponentials: Tensor, normaliser: Tensor, targets: Tensor, weights: Tensor, slope: Tensor | None
) -> Tensor:
    """d(sum of weight x nll) / d(logits), in place: softmax minus one-hot, times the slope of the cap."""
    grad = exponentials.mul_((weights / normaliser)[:, None])
    grad[torch.arange(len(targets), device=targets.device), targets] -= weights
    return grad if slope is None else grad.mul_(slope)


def _add_product(total: Tensor, grad: Tensor, states: Tensor) -> None:
    """total [vocab, hidden] += grad^T states, summed in float32."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), states)
    else:
        total += grad.t() @ states
