"""What DDP and FSDP2 share: forward and backward, the clipped and guarded step, live pieces, handing out weights."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.trainer.engines import Fill, Gate
from launcher.trainer.model import TrainedModel, hugging_face_name, persistent_buffers
from launcher.trainer.objectives import Batch
from launcher.trainer.optim import LossScale, build_adamw

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.trainer.checkpoint.format import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
PART = 16 << 20  # elements that travel at a time when weights are handed out


class TorchEngine:
    """Torch parameters, torch's fused AdamW; subclasses say how gradients meet.

    part: which part of a sharded model this rank holds; ranks of the same part hold the same

    Args:
        module: with real memory and weights
        forward_module: what is called in training: the module itself, or its DDP wrapper
        compute: type of the arithmetic; autocast does it where `autocast` is set
    """

    part = 0

    def __init__(
        self,
        recipe: Recipe,
        module: TrainedModel,
        forward_module: nn.Module,
        *,
        device: torch.device,
        compute: torch.dtype,
        autocast: bool,
    ) -> None:
        self.module, self.forward_module, self.device = module, forward_module, device
        self.compute, self.autocast = compute, autocast
        self.optimizer = build_adamw(recipe.optimizer, module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.store_frozen = recipe.checkpoint.store_frozen
        self.loss_scale = LossScale.start(device) if compute == torch.float16 else None
        self.nonfinite = torch.zeros((), dtype=torch.float64, device=device)

    def forward_backward(self, batch: Batch, *, loss_scale: float, sync: bool) -> Tensor:
        """See Engine."""
        self.module.train()
        with self.gradient_sync(sync):
            with self._autocast():
                total = self.forward_module(batch)
            # a loss that is not finite spoils the gradient on purpose: the reduction then tells every rank
            scale = torch.where(torch.isfinite(total.detach()), loss_scale, math.nan)
            if self.loss_scale is not None:
                scale = scale * self.loss_scale.value
            (total * scale).backward()
        return total.detach()

    def evaluate(self, batch: Batch) -> Tensor:
        """See Engine."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            return self.module(batch).detach()  # type: ignore[no-any-return]

    def clip_and_step(self, lr: float, max_norm: float | None, gate: Gate | None = None) -> Tensor:
        """See Engine. Clipping and the fp16 scale ride on the fused step's own division of the gradient."""
        norm = self._gradient_norm()
        if self.loss_scale is not None:
            norm = norm / self.loss_scale.value.to(norm.device)
        bad = drop = ~torch.isfinite(norm)
        if gate is not None:
            bad, drop = gate(bad)
        divisor = torch.ones_like(norm) if max_norm is None else torch.clamp((norm + 1e-6) / max_norm, min=1.0)
        if self.loss_scale is not None:
            divisor = divisor * self.loss_scale.value.to(norm.device)
        self.optimizer.grad_scale = None if max_norm is None and self.loss_scale is None else divisor.float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = drop.to(norm.device).float()  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        bad = bad.to(self.device)
        self.nonfinite = (bad if self.loss_scale is None else self.loss_scale.update(bad)).double()
        return norm

    def gradient_sync(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward: whether the ranks' gradients are reduced in it."""
        raise NotImplementedError

    def reduce_squares(self, squares: Tensor) -> Tensor:
        """Sum of squares over the ranks that hold different parts; the same tensor where each holds all."""
        return squares

    def reshard(self) -> None:
        """Put gathered parameters back into their shards."""

    def ensure_state(self) -> None:
        """See Engine."""
        self.reshard()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=_local(p).device)
                    self.optimizer.state[p] = {"step": step, **{kind: torch.zeros_like(p) for kind in MOMENTS}}

    def forget_state(self) -> None:
        """See Engine."""
        self.optimizer.state.clear()

    def pieces(self) -> Iterator[Piece]:
        """See Engine; call `ensure_state` first."""
        from launcher.trainer.checkpoint.format import Piece

        for name, p in stored_parameters(self.module, self.store_frozen):
            local, start, (replica, replicas) = place(p)
            yield Piece(hugging_face_name(name), "value", start, local, replica, replicas)
            for kind in MOMENTS if p.requires_grad else ():
                moment = place(self.optimizer.state[p][kind])[0]
                yield Piece(hugging_face_name(name), kind, start, moment, replica, replicas)
        for name, buffer in persistent_buffers(self.module):
            yield Piece(hugging_face_name(name), "value", 0, buffer.view(-1), dist.get_rank(), dist.get_world_size())

    def copies(self) -> tuple[int, Iterator[tuple[str, Tensor]]]:
        """See Engine: weights, moments and buffers that lie on several ranks."""
        self.reshard()
        return self.part, self._copied()

    def _copied(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.module.named_parameters():
            local, _, (_, replicas) = place(p)
            if replicas > 1:
                yield hugging_face_name(name), local
                state = self.optimizer.state.get(p, {})
                for kind in (kind for kind in MOMENTS if kind in state):
                    yield f"{kind} of {hugging_face_name(name)}", place(state[kind])[0]

    def set_step(self, step: int) -> None:
        """See Engine."""
        self.ensure_state()
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def refresh(self) -> None:
        """Nothing: the next forward gathers and casts what was written."""

    def parameter_shapes(self) -> dict[str, dict[str, Any]]:
        """See Engine."""
        return {
            hugging_face_name(name): {
                "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "trainable": p.requires_grad,
            }
            for name, p in [*stored_parameters(self.module, self.store_frozen), *persistent_buffers(self.module)]
        }  # fmt: skip

    def trainer_state(self) -> dict[str, Any]:
        """See Engine."""
        steps = {int(state["step"].item()) for state in self.optimizer.state.values()}
        scale = self.loss_scale
        return {
            "optimizer_step": max(steps, default=0),
            "loss_scale": None if scale is None else [float(scale.value), float(scale.good)],
        }

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """See Engine; another precision than the saved one begins its own loss scale."""
        self.set_step(int(state["optimizer_step"]))
        if self.loss_scale is not None and state.get("loss_scale"):
            value, good = state["loss_scale"]
            self.loss_scale = LossScale.start(self.device, value, good)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.compute) if self.autocast else contextlib.nullcontext()

    def _gradient_norm(self) -> Tensor:
        grads = [_local(p.grad) for p in self.parameters if p.grad is not None]
        if not grads:
            return torch.zeros((), device=self.device)
        norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)
        squares = torch.stack(list(norms)).double().square().sum()
        return self.reduce_squares(squares).sqrt().float()


def place(t: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """(local 1-D view, its start in the flattened tensor, (replica, replicas)) of a plain tensor or an FSDP2 DTensor.

    Shards are whole leading rows, ceil-sized as torch.chunk makes them, so late ranks may hold none.
    """
    if not isinstance(t, DTensor):
        return t.detach().view(-1), 0, (dist.get_rank(), dist.get_world_size())
    start, replica, replicas, rows = 0, 0, 1, t.shape[0]
    for axis, placement in enumerate(t.placements):
        size, index = t.device_mesh.size(axis), t.device_mesh.get_local_rank(axis)
        if placement.is_replicate():
            replica, replicas = replica * size + index, replicas * size
        elif placement.is_shard(0):
            start = min(index * -(-rows // size), rows)
        else:
            raise ValueError(f"{t.placements}: not one flat range")
    return t.to_local().detach().view(-1), start * math.prod(t.shape[1:]), (replica, replicas)


def stored_parameters(module: nn.Module, store_frozen: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a checkpoint holds: those that learn, and with `store_frozen` the others too."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad or store_frozen)


def hand_out(module: nn.Module, weights: dict[str, Tensor] | None, device: torch.device, *, fill: Fill) -> None:
    """Fill every rank's parameters from rank 0's, one parameter at a time: nobody else ever holds the whole model.

    Args:
        weights: on rank 0, by Hugging Face name, emptied as they are handed out; None on the others
        device: where the broadcast runs; the shards may lie elsewhere
        fill: see `engines.build`
    """
    if fill == "none":
        return
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *persistent_buffers(module)]
    if fill == "frozen":
        tensors = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    for name, tensor in tensors:
        full = weights.pop(hugging_face_name(name)) if weights is not None else None
        local, start, _ = place(tensor)
        for at, part in broadcast_parts(full, tensor.numel(), dtype=tensor.dtype, device=device):
            low, high = max(at, start), min(at + part.numel(), start + local.numel())
            if low < high:
                local[low - start : high - start].copy_(part[low - at : high - at])
        del full  # before the next one is asked for


def broadcast_parts(
    full: Tensor | None, elements: int, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of rank 0's tensor, flattened and cut into parts, on every rank; collective.

    Args:
        full: the tensor on rank 0, None on the others
        elements: of the whole tensor
    """
    for start in range(0, elements, PART):
        count = min(PART, elements - start)
        if full is None:
            part = torch.empty(count, dtype=dtype, device=device)
        else:
            part = full.reshape(-1)[start : start + count].to(device=device, dtype=dtype)
        dist.broadcast(part, src=0)
        yield start, part


def give_back_memory() -> None:
    """Return freed host memory to the system: the C library keeps what lies between blocks in use, up to gigabytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def computes_smaller(module: nn.Module, compute: torch.dtype) -> bool:
    """Whether the arithmetic has another type than what learns: fp32 weights or adapters used in half precision."""
    return any(p.dtype != compute for p in module.parameters() if p.requires_grad)


def chooses_modules(module: TrainedModel) -> bool:
    """Whether a block may pass some of its modules over for a batch, as experts kept in lists are."""
    return any(isinstance(child, nn.ModuleList) for block in module.blocks() for child in block.modules())


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
