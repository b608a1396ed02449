"""What a block's forward pass keeps for its backward pass: everything, what is dear, or only its input, here or on the
host. Blocks keep their class and their parameters' names; only `forward` of each is replaced."""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.trainer.model import TrainedModel

PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_grouped_mm",
    "aten::_scaled_grouped_mm", "transformers::grouped_mm_fallback",
}  # fmt: skip
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "flex_attention", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
}  # fmt: skip


def apply(module: TrainedModel, mode: str) -> str:
    """Set up `model.gradient_checkpointing` on a built model; a clause for the log.

    Dropout draws the same mask again in every mode.

    Raises:
        UserError: the model has no decoder blocks that could be found.
    """
    blocks = module.blocks() if mode != "none" else []
    if mode != "none" and not blocks:
        raise UserError(
            f"model.gradient_checkpointing = {mode}: expected decoder blocks, found none in "
            f"{type(module.lm).__name__}. Use model.gradient_checkpointing=none."
        )
    copies = HostCopies()
    for index, block in enumerate(blocks):
        if mode == "offload":
            block.forward = Offloaded(block, copies, first=index == 0)  # type: ignore[method-assign]
        else:
            block.forward = MethodType(_selective if mode == "selective" else _full, block)  # type: ignore[method-assign]
    return {
        "none": "no, all activations are kept",
        "selective": "what lies between matrix products and attention is recomputed in the backward pass",
        "full": "every decoder block is recomputed in the backward pass",
        "offload": "every decoder block is recomputed in the backward pass, its input waits in host memory",
    }[mode]


def compile_block(block: nn.Module) -> None:
    """Compile a block in place, before it is sharded or wrapped; parameters keep their names.

    Copies to the host stay outside of the compiled code, which knows no other streams; recomputation goes into it.
    """
    forward = block.__dict__.get("forward")
    if isinstance(forward, Offloaded):
        forward.compiled = torch.compile(functools.partial(type(block).forward, block))
    else:
        block.compile()


def _full(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(self).forward, self, **kwargs)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def _selective(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(self).forward, self, **kwargs)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep results of matrix products and of attention.

    Attention with dropout is recomputed: were it skipped, it would draw no random numbers the second time, and whatever
    drops out after it (LoRA, residuals) would get another mask than in the forward pass.
    """
    name = function.name() if callable(getattr(function, "name", None)) else function.__name__
    name = name.split(".")[0]
    if name in PRODUCTS or (name in ATTENTION and not _drops_out(function, args, kwargs)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _drops_out(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    schema = getattr(function, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0))


class Offloaded:
    """A block's forward that keeps nothing on the device: its input goes to host memory, the rest is recomputed.

    Args:
        first: the block is the first of the model, so its input is the last one needed in the backward pass
    """

    def __init__(self, block: nn.Module, copies: HostCopies, *, first: bool) -> None:
        self.block, self.copies, self.first = block, copies, first
        self.compiled: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.compiled or functools.partial(type(self.block).forward, self.block)
        if not (self.block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        states, *others = args or (kwargs.pop("hidden_states"),)

        def run(states: Tensor) -> Any:
            return forward(states, *others, **kwargs)

        pack = functools.partial(self.copies.put, first=self.first)
        with saved_tensors_hooks(pack, self.copies.take):  # what `run` saves meets the hooks of `checkpoint` alone
            return checkpoint(run, states, use_reentrant=False)


class HostCopies:
    """Blocks' inputs in host memory: copied out behind the arithmetic, brought back one block before their use.

    On a GPU both ways run on a stream of their own, from and to pinned memory; at most two copies are under way in each
    direction, so a slow bus holds up the arithmetic instead of filling the device. Elsewhere they are plain copies.
    """

    def __init__(self) -> None:
        self.last: HostCopy | None = None
        self.stream: torch.cuda.Stream | None = None

    def put(self, tensor: Tensor, *, first: bool) -> HostCopy:
        """Begin to copy out."""
        if tensor.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        self.last = HostCopy(tensor.detach(), None if first else self.last, self.stream)
        return self.last

    def take(self, copy: HostCopy) -> Tensor:
        """The tensor on its device again; the block before it, whose turn is next, begins to come back."""
        tensor = copy.take()
        if copy.previous is not None:
            copy.previous.fetch()
        return tensor


class HostCopy:
    """One block's input.

    previous: that of the block before
    """

    def __init__(self, tensor: Tensor, previous: HostCopy | None, stream: torch.cuda.Stream | None) -> None:
        self.device, self.previous, self.stream = tensor.device, previous, stream
        self.copied: torch.cuda.Event
        self.arrived: torch.cuda.Event
        self.back: Tensor | None = None
        self.host: Tensor | None = torch.empty_like(
            tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=stream is not None
        )
        if stream is None:
            self.host.copy_(tensor)
            return
        current = torch.cuda.current_stream(self.device)
        if previous is not None and previous.previous is not None:
            current.wait_event(previous.previous.copied)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self.copied = stream.record_event()

    def fetch(self) -> None:
        """Begin to bring it back, once."""
        if self.back is not None or self.host is None:
            return
        if self.stream is None:
            self.back = self.host.to(self.device)
            return
        with torch.cuda.stream(self.stream):
            self.back = self.host.to(self.device, non_blocking=True)
        self.arrived = self.stream.record_event()

    def take(self) -> Tensor:
        """The tensor, fit for use by what is computed next; the host memory is free again."""
        self.fetch()
        assert self.back is not None
        tensor, self.back, self.host = self.back, None, None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrived)
            tensor.record_stream(current)
        return tensor
