"""How attention kernels are called: our entries in transformers' registry, and the trial of a kernel before its use."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from launcher.errors import UserError

VARLEN, FLEX = "launcher_varlen", "launcher_flex"
_LENGTHS = (37, 1, 26)  # documents of the trial
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest value; a leak or a wrong mask changes it by 1


def register() -> None:
    """Make both entries known to transformers; again is harmless."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flex_attention_mask

    # looked up here, because a compiled block cannot look; where there is no such argument, the kernel needs none
    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    AttentionInterface.register(VARLEN, functools.partial(varlen_forward, asks=asks))
    AttentionInterface.register(FLEX, flex_forward)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


def varlen_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    asks: bool,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Torch's built-in variable-length flash attention in the form transformers calls.

    Args:
        query: [rows, heads, tokens, head_dim]; key and value may have fewer heads, value a smaller head_dim
        cu_seq_lens_q: [documents + 1] int32, offsets into the rows laid end to end
        asks: this torch wants to be told of fewer key heads
    Returns:
        [rows, tokens, heads, head_dim of value] and no attention weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    if attention_mask is not None or extra.get("softcap") or extra.get("s_aux") is not None:
        raise UserError(
            "model.attention = varlen: this model needs a mask, softcap or sinks. Use model.attention=flex."
        )
    rows, heads, tokens, head_dim = query.shape
    width = value.shape[-1]
    if width != head_dim:  # multi-head latent attention: one head_dim for all, cropped below
        value = functional.pad(value, [0, head_dim - width])
    flat = [t.transpose(1, 2).reshape(rows * tokens, t.shape[1], head_dim) for t in _autocast(query, key, value)]
    grouped = {"enable_gqa": key.shape[1] != heads} if asks else {}
    out = varlen_attn(
        *flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0), **grouped,
    )  # fmt: skip
    return out.view(rows, tokens, heads, head_dim)[..., :width], None


def flex_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **extra: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' flex attention with inputs of one type.

    Under autocast queries and keys leave the rotary embedding in fp32 and values are half precision; other back ends
    are cast by torch or transformers, flex attention refuses them.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    return flex_attention_forward(module, *_autocast(query, key, value), attention_mask, **extra)  # type: ignore[no-any-return]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device_type)) for t in tensors)


def trial(implementation: str, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """Run a kernel forward and backward on one row of three small documents and compare with the plain formula.

    What a package of this version does on this GPU with these heads is not written down anywhere: some have no backward
    pass for packed rows, some a wrong one.

    Args:
        implementation: name in transformers' attention registry
        config: architecture, for head_dim and shared heads; None: 64 and two queries to a key
    Returns:
        Why it cannot be used, or None.
    """
    try:
        wrong = _compare(implementation, device, dtype, config)
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        return f"its kernel fails here ({type(error).__name__}: {text})"
    return f"its kernel is wrong here ({wrong})" if wrong else None


def _compare(implementation: str, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """The first of output and gradients that differs, or None."""
    from transformers import AttentionInterface

    register()
    generator = torch.Generator().manual_seed(0)
    q_dim, v_dim, shared = heads(config)
    total = sum(_LENGTHS)

    def make(heads: int, dim: int) -> Tensor:
        random = torch.randn(1, heads, total, dim, generator=generator)
        return random.to(device, dtype).requires_grad_()

    inputs = make(2 * shared, q_dim), make(2, q_dim), make(2, v_dim)
    direction = torch.randn(1, total, 2 * shared, v_dim, generator=generator).to(device)
    scaling = q_dim**-0.5
    module: Any = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=implementation), is_causal=True, training=True, layer_idx=0,
        num_key_value_groups=shared, modules=lambda: iter(()),
    )  # fmt: skip
    offsets = torch.tensor([0, *_LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    extra = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), offsets)
    lengths = dict.fromkeys(("max_length_q", "max_length_k"), max(_LENGTHS))
    mask = _block_mask(device) if implementation in (FLEX, "flex_attention") else None
    attend = AttentionInterface()[implementation]
    out = attend(module, *inputs, mask, dropout=0.0, scaling=scaling, **extra, **lengths)[0]
    ours = [out, *torch.autograd.grad((out.float() * direction).sum(), inputs)]
    exact = tuple(t.detach().float().requires_grad_() for t in inputs)
    plain = _plain(*exact, scaling=scaling)
    theirs = [plain, *torch.autograd.grad((plain * direction).sum(), exact)]
    tolerance = _TOLERANCE.get(dtype, 1e-4)
    for what, a, b in zip(
        ("output", *(f"gradient of {name}" for name in ("queries", "keys", "values"))), ours, theirs, strict=True
    ):
        difference = ((a.float() - b).abs().max() / b.abs().max()).item()
        if not difference <= tolerance:
            return f"{what} differs by {difference:.1e}"
    return None


def heads(config: Any) -> tuple[int, int, int]:
    """(head_dim of queries and keys, of values, queries to a key)"""
    if config is None or not getattr(config, "num_attention_heads", None):
        return 64, 64, 2
    heads = config.num_attention_heads
    shared = max(1, heads // (getattr(config, "num_key_value_heads", None) or heads))
    if nope := getattr(config, "qk_nope_head_dim", None):
        return nope + config.qk_rope_head_dim, config.v_head_dim, shared
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim, head_dim, shared


def _block_mask(device: torch.device) -> Any:
    """The trial's documents as flex attention wants them."""
    from torch.nn.attention.flex_attention import create_block_mask

    document = torch.arange(len(_LENGTHS)).repeat_interleave(torch.tensor(_LENGTHS)).to(device)

    def same(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[q] == document[k])

    return create_block_mask(same, 1, None, sum(_LENGTHS), sum(_LENGTHS), device=str(device))


def _plain(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of each document alone, in float32; [rows, tokens, heads, head_dim]."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    parts = []
    for q, k, v in zip(*(t.split(_LENGTHS, dim=2) for t in (query, key, value)), strict=True):
        scores = (q @ k.transpose(-1, -2)) * scaling
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2)
