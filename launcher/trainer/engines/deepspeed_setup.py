"""What DeepSpeed needs of a process and a model before an engine is built, and what is refused before anything is."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from launcher.errors import UserError, nearest
from launcher.strategy.explained import dotted
from launcher.trainer.ops import BUILD, load_op, op_is_built
from launcher.trainer.optim import build_adamw, parameter_groups

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


def load(device: torch.device) -> Any:
    """Import DeepSpeed for this device: quiet, compiling nothing, in the process group that exists.

    Raises:
        UserError: it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cpu":
        # ranks of this node; else DeepSpeed runs a program that counts NUMA nodes, at every reduction
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "strategy.kind: zero1, zero2 and zero3 need DeepSpeed, which is not installed here "
            f"({error}). Run pip install 'train-launcher[deepspeed]'."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's older calls
    # asked for one operator of communication, DeepSpeed tries what every one of them would compile with, on each rank
    # with the compiler's complaints in its log, and then compiles that one; here it has none
    deepspeed.ops.__compatible_ops__ = {}
    _import_muon_uncompiled()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _import_muon_uncompiled() -> None:
    """ZeRO imports the Muon optimizer wherever it reduces gradients, to ask whether it is in use; its module compiles
    itself at import, which takes every rank seconds and is never used here."""
    from deepspeed.runtime import compiler

    compile, compiler.compile = compiler.compile, lambda *args, **kwargs: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


def refuse(recipe: Recipe, deepspeed: Any, module: nn.Module, *, device: torch.device, compute: torch.dtype) -> None:
    """What DeepSpeed cannot do on this machine, with this model or so many ranks, said before anything is built.

    Raises:
        UserError: the key, what it would need, and what to write instead.
    """
    zero, offload, world_size = recipe.strategy.zero, recipe.strategy.offload, dist.get_world_size()
    if compute == torch.float16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError(
            f"train.precision = fp16: expected bf16 or fp32 with strategy.kind={recipe.strategy.kind} on this "
            f"{device.type}: DeepSpeed has no fp16 here. Write bf16."
        )
    if recipe.model.compile and recipe.strategy.kind == "zero3":
        raise UserError(
            "model.compile = true: expected false with strategy.kind=zero3, which gathers weights by hooks on each "
            "layer, in the middle of what would be compiled. Use fsdp2, zero1 or zero2."
        )
    if world_size % zero.hpz_partition_size:
        raise UserError(
            f"strategy.zero.hpz_partition_size = {zero.hpz_partition_size}: expected a divisor of the {world_size} "
            "ranks. Use the ranks of one node."
        )
    classes = {type(m).__name__ for m in module.modules()}
    if unknown := [name for name in zero.leaf_modules or () if name not in classes]:
        raise UserError(
            f"strategy.zero.leaf_modules = {unknown[0]}: expected a class of this model's modules. "
            f"{nearest(unknown[0], classes) or 'Write null, and it is chosen by architecture.'}"
        )
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(zero, key) and device.type != "cuda":
            raise UserError(
                f"strategy.zero.{key} = true: expected false on a {device.type}: DeepSpeed quantises on GPUs only."
            )
        if getattr(zero, key) and not op_is_built("quantizer"):
            raise UserError(f"strategy.zero.{key} = true: needs DeepSpeed's quantizer. Run `{BUILD}` on such a node.")
    if offload.params == "nvme" and recipe.adapter.kind != "full" and recipe.checkpoint.store_frozen:
        raise UserError(
            "checkpoint.store_frozen = true: expected false with strategy.offload.params=nvme, where frozen weights "
            "are not in memory when a checkpoint is written. Write false; they are read from the base model again."
        )
    nvme = [key for key in ("optimizer", "params") if getattr(offload, key) == "nvme"]
    needed = ["async_io"] * bool(nvme) + ["cpu_adam"] * ("optimizer" in nvme)
    if lacking := [name for name in needed if not op_is_built(name)]:
        raise UserError(
            f"strategy.offload.{nvme[0]} = nvme: needs DeepSpeed's {' and '.join(lacking)}, not built for this "
            f"machine. Run `{BUILD}` on it, or write cpu."
        )


@contextlib.contextmanager
def naming_overlay(recipe: Recipe) -> Iterator[None]:
    """Where the recipe lays keys over DeepSpeed's configuration, what DeepSpeed says against it is for the user.

    Raises:
        UserError: in place of any error but those of devices, memory and communication (RuntimeError, OSError).
    """
    try:
        yield
    except (UserError, RuntimeError, OSError):
        raise
    except Exception as error:
        if not recipe.strategy.deepspeed:
            raise
        said = " ".join(str(error).split())[:400]
        raise UserError(
            f"strategy.deepspeed = {', '.join(dotted(recipe.strategy.deepspeed))}: expected what DeepSpeed builds an "
            f"engine with, but it says {type(error).__name__}: {said}. Change what it names, or remove all of it."
        ) from error


def choose_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW; DeepSpeed's own where the update is offloaded and its operator has been built."""
    place, settings = recipe.strategy.offload.optimizer, recipe.optimizer
    if recipe.strategy.offload.params == "nvme" or place == "nvme":
        load_op("async_io")
    if place != "none" and op_is_built("cpu_adam"):
        load_op("cpu_adam")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        betas = (settings.betas[0], settings.betas[1])
        return DeepSpeedCPUAdam(parameter_groups(settings, module), lr=settings.lr, betas=betas, eps=settings.eps)
    if place != "none" and dist.get_rank() == 0:
        print(
            "offload: the update runs in torch's AdamW, because DeepSpeed's faster one is not built for this machine; "
            f"`{BUILD}` builds it",
            flush=True,
        )
    return build_adamw(settings, module)


def mark_expert_blocks(deepspeed: Any, module: nn.Module) -> list[str]:
    """Let ZeRO-3 gather blocks of experts whole, whatever the architecture calls them; their classes' names.

    Which expert runs changes with the data: gathered one by one, ranks would wait for each other.
    """
    blocks = {type(m) for m in module.modules() if any(name == "experts" for name, _ in m.named_children())}
    if blocks:
        deepspeed.utils.set_z3_leaf_modules(module, list(blocks))
    return sorted(block.__name__ for block in blocks)


def hide_gathers(offload: Any) -> None:
    """Selective recomputation matches operations of the two forward passes one by one; those by which ZeRO-3 gathers
    weights differ between them, so they are kept from its sight."""

    def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    for when in ("pre", "post"):
        name = f"{when}_sub_module_forward_function"
        setattr(offload, name, hidden(getattr(offload, name)))
