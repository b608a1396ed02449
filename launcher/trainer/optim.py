"""How a gradient becomes an update: parameter groups, the optimizer, loss scale of fp16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from launcher.recipe.schema import Optimizer


def build_adamw(optimizer: Optimizer, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters.

    The fused form runs on CPU and GPU and skips an update on the device when its `found_inf` is set.
    """
    betas = (optimizer.betas[0], optimizer.betas[1])
    groups = parameter_groups(optimizer, module)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)


def parameter_groups(optimizer: Optimizer, module: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters with their weight decay: on matrices only, not on norms and biases."""
    trained = [p for p in module.parameters() if p.requires_grad]
    whole = [getattr(p, "ds_shape", p.shape) for p in trained]  # ZeRO-3 keeps the shape of what it has cut up there
    groups: list[dict[str, Any]] = [
        {"params": [p for p, shape in zip(trained, whole, strict=True) if len(shape) >= 2]},
        {"params": [p for p, shape in zip(trained, whole, strict=True) if len(shape) < 2]},
    ]
    for group, decay in zip(groups, (optimizer.weight_decay, 0.0), strict=True):
        group["weight_decay"] = decay
    return [group for group in groups if group["params"]]


@dataclass(slots=True)
class LossScale:
    """The dynamic loss scale of fp16, kept on the device so that nobody waits for it.

    value: 0-d float32, what the loss is multiplied by
    good: 0-d float32, finite steps since it last changed
    """

    value: Tensor
    good: Tensor
    growth_interval: int = 2000
    largest: float = 2.0**24

    @classmethod
    def start(cls, device: torch.device, value: float = 2.0**16, good: float = 0.0) -> LossScale:
        """A scale at its beginning, or as a checkpoint gives it."""
        return cls(torch.tensor(value, device=device), torch.tensor(good, device=device))

    def update(self, overflow: Tensor) -> Tensor:
        """Halve after an overflow, double after `growth_interval` finite steps.

        Args:
            overflow: 0-d bool, whether this step's gradient was not finite
        Returns:
            0-d bool: not finite although the scale could fall no further, so fp16 is not the cause.
        """
        exhausted = overflow & (self.value <= 1.0)
        grown = self.good + 1 >= self.growth_interval
        up = torch.where(grown, torch.clamp(self.value * 2, max=self.largest), self.value)
        self.value = torch.where(overflow, torch.clamp(self.value / 2, min=1.0), up)
        self.good = torch.where(overflow | grown, torch.zeros_like(self.good), self.good + 1)
        return exhausted
