"""DDP: a whole copy on every rank, gradients averaged in buckets while the backward pass runs."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from launcher.trainer.engines import Fill, Precision
from launcher.trainer.engines.base import TorchEngine, hand_out
from launcher.trainer.model import TrainedModel, materialise

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


class DdpEngine(TorchEngine):
    """See the module."""

    def gradient_sync(self, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce in this backward, or let gradients gather on each rank."""
        assert isinstance(self.forward_module, DistributedDataParallel)
        return contextlib.nullcontext() if sync else self.forward_module.no_sync()  # type: ignore[no-any-return]


def build(
    recipe: Recipe,
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
        for block in module.blocks():
            block.compile()
    # every rank was given the same weights above, so DDP need not send them again; buffers never change
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    wrapped = DistributedDataParallel(module, init_sync=False, gradient_as_bucket_view=True, **{buffers: False})
    half = precision.compute != torch.float32 and recipe.model.dtype == "fp32"
    return DdpEngine(recipe, module, wrapped, device=device, compute=precision.compute, autocast=half)
