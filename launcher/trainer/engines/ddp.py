"""DDP: a whole copy on every rank, gradients averaged in fp32, in buckets, while the backward pass runs."""

# no `from __future__ import annotations` here: DDP reads the annotations of a communication hook

import contextlib
import inspect
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import UserError
from launcher.trainer.activations import compile_block
from launcher.trainer.engines import Fill, Precision
from launcher.trainer.engines.base import TorchEngine, chooses_modules, computes_smaller, hand_out
from launcher.trainer.model import TrainedModel, hugging_face_name, materialise
from launcher.trainer.objectives import Batch

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


class DdpEngine(TorchEngine):
    """See the module."""

    complete = False  # whether a first reduction has been seen to hold a gradient of every parameter

    def forward_backward(self, batch: Batch, *, loss_scale: float, sync: bool) -> Tensor:
        """See Engine.

        Raises:
            UserError: a trained parameter takes no part in the loss.
        """
        if not self.complete and dist.get_world_size() > 2:
            self._settle_buckets(batch)
        total = super().forward_backward(batch, loss_scale=loss_scale, sync=sync)
        if sync and not self.complete:
            self.complete = True
            self._refuse_unused()
        return total

    def _settle_buckets(self, batch: Batch) -> None:
        """Show DDP a backward pass, whose gradients are dropped, so that every step of an attempt finds equal buckets.

        DDP lays its buckets anew once it has seen in which order gradients come (torch 2.13, `_rebuild_buckets`), and
        more than two ranks sum a gradient in an order that hangs on its place in the bucket. Without this the first
        step of a resumed run would differ in its last bits from the same step of a run that went on (L4).
        """
        self.complete = True
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            super().forward_backward(batch, loss_scale=1.0, sync=True)
        self._refuse_unused()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_sync(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce in this backward, or let gradients gather on each rank."""
        assert isinstance(self.forward_module, DistributedDataParallel)
        return contextlib.nullcontext() if sync else self.forward_module.no_sync()  # type: ignore[no-any-return]

    def _refuse_unused(self) -> None:
        """Its bucket would never be reduced, and torch would say so in its own words one step later."""
        unused = [hugging_face_name(n) for n, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused and not self.forward_module.find_unused_parameters:
            shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
            raise UserError(
                f"strategy.kind = ddp: expected a gradient for every trained parameter, found none for {shown}, which "
                "the model's forward pass does not use. Use strategy.kind=fsdp2, or leave these out of adapter.targets."
            )


def build(
    recipe: "Recipe",
    module: TrainedModel,
    *,
    device: torch.device,
    precision: Precision,
    weights: dict[str, Tensor] | None,
    fill: Fill,
) -> DdpEngine:
    """See `engines.build`."""
    materialise(module, device)
    hand_out(module, weights, device, fill=fill)
    if recipe.model.compile:
        torch._dynamo.config.optimize_ddp = False  # would cut blocks at buckets, and cannot where one is recomputed
        for block in module.blocks():
            compile_block(block)
    # every rank was given the same weights above, so DDP need not send them again; buffers never change
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    wrapped = DistributedDataParallel(
        module, init_sync=False, gradient_as_bucket_view=True, find_unused_parameters=chooses_modules(module),
        **{buffers: False},
    )  # fmt: skip
    if any(p.requires_grad and p.dtype != torch.float32 for p in module.parameters()):
        wrapped.register_comm_hook(None, average_in_fp32)
    autocast = computes_smaller(module, precision.compute)
    return DdpEngine(recipe, module, wrapped, device=device, compute=precision.compute, autocast=autocast)


def average_in_fp32(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of half-precision gradients in fp32, as the other strategies do."""
    gradients = bucket.buffer()
    wide = gradients.float().div_(dist.get_world_size())
    reduced = dist.all_reduce(wide, async_op=True).get_future()  # type: ignore[union-attr]
    return reduced.then(lambda done: gradients.copy_(done.value()[0]))  # type: ignore[no-any-return]
