"""Which attention back end is used, why, and how it keeps the documents of a row apart; the one seam of attention."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from launcher.errors import UserError

# name in the recipe -> name in transformers' attention registry
IMPLEMENTATIONS = {
    "flash_attention_3": "flash_attention_3",
    "flash_attention_2": "flash_attention_2",
    "varlen": "launcher_varlen",
    "flex": "flex_attention",
    "sdpa": "sdpa",
    "eager": "eager",
}
_OFFSETS = ("flash_attention_3", "flash_attention_2", "varlen")
_SUPPORT = {
    "flash_attention_3": "_supports_flash_attn",
    "flash_attention_2": "_supports_flash_attn",
    "varlen": "_supports_attention_backend",
    "flex": "_supports_flex_attn",
    "sdpa": "_supports_sdpa",
}
_ISOLATING_LAYERS = {"full_attention", "sliding_attention", "attention", "dense", "sparse"}


@dataclass(frozen=True, slots=True)
class Attention:
    """A back end and the reason for it.

    backend: name as in the recipe
    reason: one clause for the log
    """

    backend: str
    reason: str

    @property
    def implementation(self) -> str:
        """Name in transformers' attention registry; registers ours first."""
        if self.backend == "varlen":
            _register_varlen()
        return IMPLEMENTATIONS[self.backend]


def choose(
    requested: str, device: torch.device, *, dtype: torch.dtype, config: Any = None, model_class: Any = None
) -> Attention:
    """The back end for this device.

    Args:
        requested: key `model.attention`
        dtype: type of the arithmetic; the flash kernels take only half precision
        config: architecture as transformers knows it; None: not looked at
        model_class: transformers' class, which says what it supports; None: not looked at
    Raises:
        UserError: the requested one cannot run here or cannot keep documents apart; names those that can.
    """
    _refuse_leaking_layers(config)
    problems = {b: _unsupported(b, model_class) or _problem(b, device, dtype, config) for b in IMPLEMENTATIONS}
    usable = [backend for backend, problem in problems.items() if problem is None]
    if requested != "auto":
        if problem := problems[requested]:
            raise UserError(f"model.attention = {requested}: {problem}. Usable here: {', '.join(['auto', *usable])}.")
        return Attention(requested, "asked for in the recipe")
    passed_over = "; ".join(f"{backend}: {problems[backend]}" for backend in IMPLEMENTATIONS if problems[backend])
    # eager is last in the order and always usable
    chosen = usable[0]
    return Attention(chosen, f"first usable on {device.type}" + (f" ({passed_over})" if passed_over else ""))


def forward_arguments(backend: str, *, cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, Any]:
    """What the model's forward takes beside `position_ids` so that documents stay apart.

    Never an attention mask: an all-ones mask switches the block-diagonal mask of sdpa and eager off in silence.

    Args:
        cu_seqlens: [documents + 1] int32, offsets into the flattened rows, padding included
        max_seqlen: tokens of the longest document
    """
    if backend not in _OFFSETS:
        return {}
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def _unsupported(backend: str, model_class: Any) -> str | None:
    flag = _SUPPORT.get(backend)
    if model_class is None or flag is None or getattr(model_class, flag, False):
        return None
    return f"{model_class.__name__} does not support it"


def _problem(backend: str, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """Why a back end cannot be used here, or None."""
    half = dtype in (torch.float16, torch.bfloat16)
    if backend in ("sdpa", "eager"):
        softcap = getattr(config, "attn_logit_softcapping", None)
        return "cannot cap attention scores, which this model needs" if backend == "sdpa" and softcap else None
    if device.type != "cuda":
        return "has no backward pass on the CPU" if backend == "flex" else "needs a GPU"
    if backend == "flex":
        return None
    if not half:
        return f"needs half precision, not {str(dtype).removeprefix('torch.')}"
    if backend == "varlen":
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no torch.nn.attention.varlen"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or newer"
        missing = [key for key in ("attn_logit_softcapping", "attention_dropout") if getattr(config, key, None)]
        return f"cannot do {', '.join(missing)}, which this model needs" if missing else None
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = is_flash_attn_3_available() if backend == "flash_attention_3" else is_flash_attn_2_available()
    return None if available else "its package is not installed"


def _refuse_leaking_layers(config: Any) -> None:
    """Recurrent and linear-attention layers carry state across the border of documents: no back end can stop them."""
    layers = set(getattr(config, "layer_types", None) or ())
    if leaking := layers - _ISOLATING_LAYERS:
        raise UserError(
            f"model: layers of type {', '.join(sorted(leaking))} carry state from one document of a row to the next. "
            "Take a model with attention in every layer."
        )


def refuse_without_positions(backbone: torch.nn.Module) -> None:
    """A model that takes no `position_ids` cannot be told where a document begins."""
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters:
        raise UserError(
            f"{type(backbone).__name__} takes no position_ids, so documents of one row cannot be kept apart. "
            "Take another architecture."
        )


def _register_varlen() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATIONS["varlen"], _varlen_forward)


def _varlen_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's built-in variable-length flash attention in the form transformers calls.

    Args:
        query: [rows, heads, tokens, head_dim]; key and value may have fewer heads
        cu_seq_lens_q: [documents + 1] int32, offsets into the rows laid end to end
    Returns:
        [rows, tokens, heads, head_dim] and no attention weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    if attention_mask is not None or extra.get("softcap") or extra.get("s_aux") is not None:
        raise UserError(
            "model.attention = varlen: this model needs a mask, softcap or sinks. Use model.attention=flex."
        )
    rows, heads, tokens, _ = query.shape
    flat = [t.transpose(1, 2).reshape(rows * tokens, t.shape[1], t.shape[3]) for t in (query, key, value)]
    if flat[0].dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        flat = [t.to(torch.get_autocast_dtype(query.device.type)) for t in flat]
    out = varlen_attn(
        *flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0), enable_gqa=key.shape[1] != heads,
    )  # fmt: skip
    return out.view(rows, tokens, heads, -1), None
