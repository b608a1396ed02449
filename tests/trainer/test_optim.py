"""Decay groups and the fp16 loss scale."""

from __future__ import annotations

import torch

from launcher.recipe.schema import Optimizer
from launcher.trainer.optim import LossScale, build_adamw


def test_weight_decay_acts_on_matrices_and_not_on_norms_and_biases() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, rest = build_adamw(Optimizer(weight_decay=0.3), module).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.3
    assert [p.ndim for p in rest["params"]] == [1, 1, 1]
    assert rest["weight_decay"] == 0.0


def test_loss_scale_halves_on_overflow_doubles_after_good_steps_and_says_when_it_can_fall_no_further() -> None:
    scale = LossScale.start(torch.device("cpu"), 4.0)
    scale.growth_interval = 2
    no, yes = torch.tensor(False), torch.tensor(True)
    seen = []
    for overflow in (no, no, yes, yes, yes):
        assert not scale.update(overflow)
        seen.append(scale.value.item())
    assert seen == [4.0, 8.0, 4.0, 2.0, 1.0]
    assert scale.update(yes)
    assert scale.value.item() == 1.0
