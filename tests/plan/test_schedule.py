"""The learning rate of each step, and what another length of the run does to it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from launcher.plan.schedule import jump, learning_rate
from launcher.recipe.schema import Optimizer


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


def test_a_schedule_over_given_steps_does_not_move_with_the_run_and_stays_where_it_ended() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        alone = rates(100, schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.05)
        inside = rates(150, schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.05, schedule_steps=100)
        assert inside[:101] == alone
        assert set(inside[101:]) == {alone[100]}
        assert rates(40, schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.05, schedule_steps=100) == alone[:41]


def test_another_length_asks_which_curve_is_meant_where_the_rate_would_jump() -> None:
    found = jump(Optimizer(lr=1.0, schedule="linear"), 50, old_steps=100, new_steps=200)
    assert found is not None
    assert (found.old, found.new) == (0.5, 0.75)
    words = found.choice("train.max_steps: 100 -> 200")
    assert "of step 51 would jump from 0.5 to 0.75" in words
    assert "optimizer.schedule_steps=100: goes on with the old one: 0.5 at step 51\n" in words
    assert "optimizer.schedule_steps=200: lays it anew over 200 steps: 0.75 at step 51" in words
    ended = jump(Optimizer(lr=1.0), 100, old_steps=100, new_steps=200)
    assert ended is not None
    assert "0 at step 101, its end, where the rate then stays, so that nothing more is learnt" in ended.choice("x")


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        ({"schedule": "constant"}, 50),
        ({"schedule": "constant", "warmup_steps": 80}, 50),
        ({"schedule": "wsd"}, 50),  # before its fall: lengthened as it is meant to be
        ({"schedule": "cosine", "warmup_steps": 80}, 50),  # inside a warm-up of so many steps
        ({"schedule": "cosine", "schedule_steps": 100}, 50),  # said
    ],
)
def test_where_the_next_step_has_the_same_rate_either_way_nothing_is_asked(keys: dict, step: int) -> None:
    assert jump(Optimizer(lr=1.0, **keys), step, old_steps=100, new_steps=200) is None


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        ({"schedule": "constant", "warmup_ratio": 0.8}, 50),
        ({"schedule": "wsd"}, 95),
        ({"schedule": "wsd"}, 100),
        ({"schedule": "cosine", "warmup_steps": 10}, 50),
    ],
)
def test_inside_a_warm_up_by_ratio_and_behind_the_flat_part_it_is_asked(keys: dict, step: int) -> None:
    assert jump(Optimizer(lr=1.0, **keys), step, old_steps=100, new_steps=200) is not None
