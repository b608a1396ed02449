"""FSDP2 and HSDP: model state sharded by `fully_shard`, one unit for each decoder block and one for the rest."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from launcher.errors import UserError
from launcher.trainer.activations import compile_block
from launcher.trainer.engines import Fill, Precision
from launcher.trainer.engines.base import TorchEngine, chooses_modules, computes_smaller, hand_out
from launcher.trainer.model import TrainedModel, materialise

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe, Strategy


class Fsdp2Engine(TorchEngine):
    """See the module."""

    shard_group: Any
    keep_whole: bool  # reshard_after_forward: false, memory for traffic

    @contextlib.contextmanager
    def gradient_sync(self, sync: bool) -> Iterator[None]:
        """Between micro-batches only shards of the gradient are kept, and copies (HSDP) meet at the last one alone.

        With `keep_whole` nothing travels before the last: whole gradients gather on each rank, weights stay gathered.
        """
        assert isinstance(self.module, FSDPModule)
        if self.keep_whole:
            self.module.set_requires_gradient_sync(sync)
            self.module.set_reshard_after_backward(sync)
        else:
            self.module.set_requires_all_reduce(sync)
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
    strategy = recipe.strategy
    mesh = _mesh(strategy, device)
    low = precision.compute if computes_smaller(module, precision.compute) else None
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": strategy.reshard_after_forward}
    if strategy.offload.params == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    units = module.blocks()
    with _one_mesh_of_groups():
        for block in units:
            if recipe.model.compile:
                compile_block(block)
            fully_shard(block, mp_policy=MixedPrecisionPolicy(low, torch.float32), **options)
    # the root's float inputs are token weights, which must not be rounded
    root = {**options, "reshard_after_forward": None if strategy.reshard_after_forward else False}
    fully_shard(module, mp_policy=MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False), **root)
    assert isinstance(module, FSDPModule)
    if strategy.prefetch is not None:
        _prefetch(module, units, strategy.prefetch)
    if chooses_modules(module) and hasattr(module, "set_reduce_scatter_unused_params"):  # since torch 2.13
        module.set_reduce_scatter_unused_params(True)
    materialise(module, torch.device("cpu") if strategy.offload.params == "cpu" else device)
    _move_buffers(module, device)
    hand_out(module, weights, device, fill=fill)
    engine = Fsdp2Engine(recipe, module, module, device=device, compute=precision.compute, autocast=False)
    engine.shard_group, engine.part = mesh.get_group("shard"), mesh.get_local_rank("shard")
    engine.keep_whole = strategy.reshard_after_forward is False
    return engine


def _prefetch(root: FSDPModule, units: list[Any], count: int) -> None:
    """Gather so many blocks ahead of their use: later ones in the forward pass, earlier ones in the backward pass."""
    root.set_modules_to_forward_prefetch(units[:count])
    root.set_modules_to_backward_prefetch(units[-count:][::-1])
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, i - count) : i][::-1])


@contextlib.contextmanager
def _one_mesh_of_groups() -> Iterator[None]:
    """With `reshard_after_forward: N`, `fully_shard` would make a mesh and its process groups anew for each block.

    Each NCCL group keeps buffers on the GPU, so here all blocks get the first one's. Where torch has moved the function
    that makes them, nothing is shared and nothing breaks.
    """
    place = importlib.import_module("torch.distributed.fsdp._fully_shard._fully_shard")
    make = getattr(place, "_get_post_forward_mesh_info", None)
    made: dict[Any, Any] = {}

    def once(reshard_after_forward: Any, mesh_info: Any) -> Any:
        if isinstance(reshard_after_forward, bool):
            return make(reshard_after_forward, mesh_info)  # type: ignore[misc]
        if reshard_after_forward not in made:
            made[reshard_after_forward] = make(reshard_after_forward, mesh_info)  # type: ignore[misc]
        return made[reshard_after_forward]

    if make is not None:
        place._get_post_forward_mesh_info = once  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if make is not None:
            place._get_post_forward_mesh_info = make  # type: ignore[attr-defined]


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
