"""The engines by name, the protocol they keep, and the build that is the same for all: skeleton, memory, weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from launcher.errors import UserError
from launcher.trainer.model import TrainedModel
from launcher.trainer.objectives import Batch

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.trainer.checkpoint.format import Piece

ENGINES = {
    "ddp": "launcher.trainer.engines.ddp",
    "fsdp2": "launcher.trainer.engines.fsdp2",
    "zero1": "launcher.trainer.engines.deepspeed",
    "zero2": "launcher.trainer.engines.deepspeed",
    "zero3": "launcher.trainer.engines.deepspeed",
}


Fill = Literal["all", "frozen", "none"]
# takes whether this rank's gradient is not finite; gives whether any rank's is not, and whether to drop the update
Gate = Callable[[Tensor], tuple[Tensor, Tensor]]
NAMES: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip


class Engine(Protocol):
    """How model state lies on the ranks, behind what the loop and the checkpoint need."""

    device: torch.device

    def forward_backward(self, batch: Batch, *, loss_scale: float, sync: bool) -> Tensor:
        """Add this micro-batch's gradient; returns its sum of weighted nll, 0-d float64, detached, on the device.

        Gradients are averaged over the ranks, so for L = sum / W the loop passes loss_scale = world_size / W.
        With `sync` (the last micro-batch of a step) the ranks' gradients are reduced.
        """

    def evaluate(self, batch: Batch) -> Tensor:
        """The same sum without gradients and without dropout."""

    def clip_and_step(self, lr: float, max_norm: float | None, gate: Gate | None = None) -> Tensor:
        """Update the weights; returns the norm of the global gradient before clipping, 0-d, on the device.

        A gradient that is not finite changes nothing, decided on the device; `nonfinite` then holds 1.

        Args:
            gate: asked before the update, where it may have to be dropped for another reason; 0-d bools on the device
        """

    nonfinite: Tensor  # 0-d float64, 1 when the last step was dropped for a reason other than the fp16 loss scale

    def ensure_state(self) -> None:
        """Make moments exist and every parameter be in its sharded place, so that `pieces` shows all of the state."""

    def forget_state(self) -> None:
        """Let go of the moments that `ensure_state` made before any step, so that the first one finds none."""

    def pieces(self) -> Iterable[Piece]:
        """Live 1-D views of this rank's values and moments; the same list serves writing and reading in place."""

    def set_step(self, step: int) -> None:
        """Set the optimizer's count of updates."""

    def refresh(self) -> None:
        """Called after state was written in place."""

    def parameter_shapes(self) -> dict[str, dict[str, Any]]:
        """Hugging Face name -> {shape, dtype, trainable} of what `pieces` shows: trained parameters and persistent
        buffers, and with `checkpoint.store_frozen` the frozen parameters."""

    def copies(self) -> tuple[int, Iterator[tuple[str, Tensor]]]:
        """(which copy of the state this rank has a part in common with, by number; what it holds in common with the
        other ranks of that number, by name, live and in the same order on each). Nothing where all is in shards."""

    def trainer_state(self) -> dict[str, Any]:
        """What beside the pieces must survive: the optimizer's count, the fp16 loss scale. Waits for the device."""

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """Take back what `trainer_state` gave."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Type of the arithmetic and the reason for it."""

    compute: torch.dtype
    reason: str

    @property
    def name(self) -> Literal["fp32", "bf16", "fp16"]:
        """As a recipe says it."""
        return NAMES[self.compute]


def choose_precision(requested: str, dtype: str, device: torch.device) -> Precision:
    """What `train.precision` means for weights of `model.dtype` on this device.

    Raises:
        UserError: bf16 weights with another precision, or bf16 on a GPU that only emulates it.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cuda" and not native and "bf16" in (requested, dtype):
        raise UserError(
            f"{'train.precision' if requested == 'bf16' else 'model.dtype'} = bf16: expected a GPU with native bf16 "
            f"(compute capability 8.0 or newer), this one is {torch.cuda.get_device_name(device)}. "
            "Use model.dtype=fp32 with train.precision=fp16."
        )
    if dtype == "bf16":
        if requested in ("fp32", "fp16"):
            raise UserError(
                f"train.precision = {requested}: expected auto or bf16 with model.dtype=bf16. "
                "Or use model.dtype=fp32, the master copy of mixed precision."
            )
        return Precision(torch.bfloat16, "weights are bf16 (model.dtype)")
    if requested == "auto":
        why = "this GPU computes bf16 natively" if native else f"no native bf16 on this {device.type}"
        return Precision(torch.bfloat16 if native else torch.float32, f"auto: {why}")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Precision(types[requested], "asked for in the recipe")


def build(
    recipe: Recipe,
    module: TrainedModel,
    *,
    device: torch.device,
    precision: Precision,
    weights: dict[str, Tensor] | None,
    fill: Fill,
) -> Engine:
    """The engine of `strategy.kind` around a skeleton.

    Args:
        weights: on the job's one reader, by Hugging Face name; None elsewhere
        fill: which of the reader's weights are handed out: all; none when a checkpoint holds all of them; frozen when
            it holds only what is trained
    """
    from launcher.trainer.engines.base import give_back_memory

    engine: Engine = importlib.import_module(ENGINES[recipe.strategy.kind]).build(
        recipe, module, device=device, precision=precision, weights=weights, fill=fill
    )
    give_back_memory()  # the reader held the whole model
    return engine
