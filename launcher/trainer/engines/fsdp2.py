"""FSDP2 and HSDP: model state sharded by `fully_shard`, one unit for each decoder block and one for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from launcher.errors import UserError
from launcher.trainer.engines import Fill, Precision
from launcher.trainer.engines.base import TorchEngine, hand_out
from launcher.trainer.model import TrainedModel, materialise

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe, Strategy


class Fsdp2Engine(TorchEngine):
    """See the module."""

    shard_group: Any

    @contextlib.contextmanager
    def gradient_sync(self, sync: bool) -> Iterator[None]:
        """Reduce in this backward, or let unsharded gradients gather on each rank."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(sync)
        yield

    def reduce_squares(self, squares: Tensor) -> Tensor:
        """Each rank of the shard group holds a part of the gradient."""
        dist.all_reduce(squares, group=self.shard_group)
        return squares

    def reshard(self) -> None:
        """After an evaluation, units that stay gathered show plain full tensors as parameters."""
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def build(
    recipe: Recipe,
    module: TrainedModel,
    *,
    device: torch.device,
    precision: Precision,
    weights: dict[str, Tensor] | None,
    fill: Fill,
) -> Fsdp2Engine:
    """See `engines.build`."""
    mesh = _mesh(recipe.strategy, device)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": recipe.strategy.reshard_after_forward}
    half = precision.compute != torch.float32 and recipe.model.dtype == "fp32"
    low = precision.compute if half else None
    if recipe.strategy.offload.params == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in module.blocks():
        if recipe.model.compile:
            block.compile()
        fully_shard(block, mp_policy=MixedPrecisionPolicy(low, torch.float32), **options)
    # the root's float inputs are token weights, which must not be rounded
    root = {**options, "reshard_after_forward": None if recipe.strategy.reshard_after_forward else False}
    fully_shard(module, mp_policy=MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False), **root)
    materialise(module, torch.device("cpu") if recipe.strategy.offload.params == "cpu" else device)
    _move_buffers(module, device)
    hand_out(module, weights, device, fill=fill)
    engine = Fsdp2Engine(recipe, module, module, device=device, compute=precision.compute, autocast=False)
    engine.shard_group = mesh.get_group("shard")
    return engine


def _mesh(strategy: Strategy, device: torch.device) -> DeviceMesh:
    """`strategy.replicate` x `strategy.shard` over all ranks; two axes (HSDP) only when there are replicas."""
    world = dist.get_world_size()
    shard = strategy.shard or world // (strategy.replicate or 1)
    replicate = strategy.replicate or world // shard
    if replicate * shard != world:
        raise UserError(
            f"strategy.shard = {shard}: expected replicate x shard = {world} ranks, got {replicate} x {shard}. "
            "Set both to null to shard over all ranks."
        )
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def _move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """With offload the parameters wait in host memory; buffers are used where the arithmetic is."""
    for child in module.modules():
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = buffer.to(device)
