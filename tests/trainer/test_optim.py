"""Schedules, decay groups and the fp16 loss scale."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from launcher.recipe.schema import Optimizer
from launcher.trainer.optim import LossScale, build_adamw, learning_rate


def rates(total: int = 100, **keys: object) -> list[float]:
    optimizer = Optimizer(lr=1.0, **keys)  # type: ignore[arg-type]
    return [learning_rate(optimizer, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_linearly_to_the_rate_and_the_schedule_never_exceeds_it(schedule: str) -> None:
    values = rates(schedule=schedule, warmup_steps=10)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(values) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_falling_schedule_reaches_its_floor_after_the_last_step_and_never_rises(schedule: str) -> None:
    values = rates(schedule=schedule, min_lr_ratio=0.1)
    assert values[100] == pytest.approx(0.1)
    assert values[99] > 0.1
    assert all(a >= b - 1e-12 for a, b in pairwise(values))


def test_cosine_is_halfway_in_the_middle() -> None:
    assert rates(schedule="cosine")[50] == pytest.approx(0.5)


def test_wsd_is_flat_until_the_last_tenth() -> None:
    values = rates(schedule="wsd", warmup_steps=10)
    assert values[10:91] == [1.0] * 81
    assert values[91] == pytest.approx(0.9)
    assert values[99] == pytest.approx(0.1)


def test_warm_up_ratio_is_a_share_of_all_steps() -> None:
    assert rates(schedule="constant", warmup_ratio=0.2)[:21] == rates(schedule="constant", warmup_steps=20)[:21]


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
