"""The objectives by name, and the tensors they work on; each objective turns documents into loss terms."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from launcher.trainer import attention

if TYPE_CHECKING:
    from launcher.data.batches import MicroBatch

OBJECTIVES = {
    "sft": "launcher.trainer.objectives.sft",
    "pretrain": "launcher.trainer.objectives.pretrain",
}


class Objective(Protocol):
    """What a module of this folder offers."""

    def check(self, micro: MicroBatch) -> None:
        """Refuse a micro-batch that does not fit the objective."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Sum of the weighted loss terms of a micro-batch, float64, 0-d."""


@dataclass(slots=True)
class Batch:
    """One micro-batch as tensors; only trained tokens reach the head.

    input_ids, position_ids: [rows, tokens] int64; positions restart in every document
    trained: [n] int64, places in the flattened rows whose next token is a target
    targets: [n] int64, that next token
    weights: [n] float32, its weight
    attention: what the attention back end takes beside the positions
    uniform: every weight is 1
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    trained: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    attention: dict[str, Any]
    uniform: bool

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory do not wait."""
        move = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        move = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in move.items()}
        extra = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in self.attention.items()
        }
        return Batch(**{**move, "attention": extra})

    def pin(self) -> Batch:
        """The same in page-locked memory."""
        move = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        move = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in move.items()}
        extra = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in self.attention.items()}
        return Batch(**{**move, "attention": extra})


def get(kind: str) -> Objective:
    """The objective's module."""
    return importlib.import_module(OBJECTIVES[kind])  # type: ignore[return-value]


def to_batch(micro: MicroBatch, *, backend: str) -> Batch:
    """The tensors of one micro-batch, on the CPU; runs in the prefetch thread."""
    weights = np.asarray(micro.weights).reshape(-1)
    trained = np.flatnonzero(weights)
    offsets = torch.as_tensor(np.asarray(micro.cu_seqlens, dtype=np.int32))
    return Batch(
        input_ids=torch.as_tensor(np.asarray(micro.input_ids, dtype=np.int64)),
        position_ids=torch.as_tensor(np.asarray(micro.position_ids, dtype=np.int64)),
        trained=torch.as_tensor(trained),
        targets=torch.as_tensor(np.asarray(micro.targets, dtype=np.int64).reshape(-1)[trained]),
        weights=torch.as_tensor(weights[trained].astype(np.float32)),
        attention=attention.forward_arguments(backend, cu_seqlens=offsets, max_seqlen=int(micro.max_seqlen)),
        uniform=bool((weights[trained] == 1).all()),
    )
