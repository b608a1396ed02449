"""Which attention back end is used, why, and how it keeps the documents of a row apart; the one seam of attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from launcher.errors import UserError
from launcher.trainer.attention_kernels import FLEX, VARLEN, register, trial

# name in the recipe -> name in transformers' attention registry, in the order in which `auto` tries them
IMPLEMENTATIONS = {
    "flash_attention_4": "flash_attention_4",
    "flash_attention_3": "flash_attention_3",
    "flash_attention_2": "flash_attention_2",
    "varlen": VARLEN,
    "flex": FLEX,
    "sdpa": "sdpa",
    "eager": "eager",
}
_OFFSETS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen")
# compute capabilities, first included, second not; the packages bring kernels for no others
_CAPABILITIES = {
    "flash_attention_4": ((9, 0), None),
    "flash_attention_3": ((8, 0), (10, 0)),
    "flash_attention_2": ((8, 0), None),
    "varlen": ((8, 0), None),
    "flex": ((7, 5), None),  # Triton's
}
# keys of an architecture that a back end ignores or refuses
_UNABLE = {
    "flash_attention_4": ("attention_dropout",),
    "flash_attention_3": ("attention_dropout",),
    "flash_attention_2": (),
    "varlen": ("attn_logit_softcapping", "attention_dropout"),
    "flex": ("attention_dropout",),
    "sdpa": ("attn_logit_softcapping",),
    "eager": (),
}
_PACKAGES = {
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3 (module flash_attn_interface)",
    "flash_attention_2": "flash-attn",
}
_SUPPORT = {
    "flash_attention_4": "_supports_flash_attn",
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
        register()
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

    def problem(backend: str) -> str | None:
        return _unsupported(backend, model_class) or _problem(backend, device, dtype, config)

    if requested != "auto":
        if why := problem(requested) or _trial(requested, device, dtype, config):
            usable = [backend for backend in IMPLEMENTATIONS if backend != requested and not problem(backend)]
            raise UserError(f"model.attention = {requested}: {why}. Usable here: {', '.join(['auto', *usable])}.")
        return Attention(requested, "asked for in the recipe")
    passed_over = []
    for backend in IMPLEMENTATIONS:
        why = problem(backend) or _trial(backend, device, dtype, config)
        if why is None:
            break  # eager is last in the order and always usable
        passed_over.append(f"{backend}: {why}")
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    return Attention(backend, f"first usable on {device.type}{reasons}")


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
    """What the model's own code says about a back end."""
    flag = _SUPPORT.get(backend)
    if model_class is None or flag is None:
        return None
    only = getattr(model_class, "_compatible_flash_implementations", None)
    known = backend not in _PACKAGES or only is None or backend in only  # else transformers takes another in silence
    return None if getattr(model_class, flag, False) and known else f"{model_class.__name__} does not support it"


def _problem(backend: str, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """Why a back end cannot be used here, or None; runs nothing."""
    if backend in _CAPABILITIES:
        if device.type != "cuda":
            return "has no backward pass on the CPU" if backend == "flex" else "needs a GPU"
        if backend != "flex" and dtype not in (torch.float16, torch.bfloat16):
            return f"needs half precision, not {str(dtype).removeprefix('torch.')}"
        least, below = _CAPABILITIES[backend]
        if (capability := torch.cuda.get_device_capability(device)) < least or (below and capability >= below):
            allowed = f"{least[0]}.{least[1]} or newer" + (f", below {below[0]}.{below[1]}" if below else "")
            return f"needs compute capability {allowed}, this GPU has {capability[0]}.{capability[1]}"
    if backend in _PACKAGES and not _installed(backend):
        return f"package {_PACKAGES[backend]} is not installed"
    missing = [key for key in _UNABLE[backend] if getattr(config, key, None)]
    return f"cannot do {', '.join(missing)}, which this model needs" if missing else None


def _installed(backend: str) -> bool:
    """FlashAttention 2 and 4 share the module name flash_attn; transformers tells their distributions apart."""
    from transformers.utils import import_utils

    available = getattr(import_utils, f"is_flash_attn_{backend[-1]}_available", None)
    return available is not None and bool(available())


def _trial(backend: str, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """Torch's own sdpa and the plain formula are taken as they are; a kernel of a package is tried first."""
    return trial(IMPLEMENTATIONS[backend], device, dtype, config) if backend in _CAPABILITIES else None


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
