"""How often a checkpoint pays: the optimum of Young and Daly, and its bounds."""

from __future__ import annotations

import math

import pytest

from launcher.plan.saving import MOST_SHARE, SaveCost, best_interval, lost_s, useful_share

DAY = 86400.0


def test_the_optimum_is_young_s_for_rare_failures_and_daly_s_loses_no_more_anywhere() -> None:
    cost = SaveCost(0.5, 2.0)
    found = best_interval(cost, mttf_s=DAY, lead_s=300)
    assert found.seconds == pytest.approx(math.sqrt(2 * 0.5 * DAY), rel=0.01)
    assert "Young and Daly" in found.reason
    best = useful_share(found.seconds, cost, mttf_s=DAY)
    for factor in (0.3, 0.7, 1.5, 3):
        assert useful_share(found.seconds * factor, cost, mttf_s=DAY) < best
    assert lost_s(100, cost) == 52


@pytest.mark.parametrize(
    ("cost", "keys", "seconds", "words"),
    [
        (SaveCost(10, 10), {"mttf_s": 600}, 10 / MOST_SHARE, "at most 5% of the time"),
        (SaveCost(0.01, 120), {"mttf_s": 600}, 120, "durable before the next"),
        (SaveCost(0.001, 0.001), {"mttf_s": 60, "step_s": 30}, 30, "no less than a step"),
        (SaveCost(5, 200), {"mttf_s": 100 * DAY}, 300, "may not be done within stop_lead_s"),  # 2 x 200 > 300
        (SaveCost(1e9, 0.01), {"mttf_s": 3600}, 1e9 / MOST_SHARE, "at most 5%"),
    ],
)
def test_each_bound_is_kept_and_named(cost: SaveCost, keys: dict, seconds: float, words: str) -> None:
    found = best_interval(cost, **{"lead_s": 300, **keys})
    assert found.seconds == pytest.approx(seconds)
    assert words in found.reason


def test_a_save_that_fits_into_the_grace_time_twice_is_not_bounded_by_it() -> None:
    assert best_interval(SaveCost(5, 140), mttf_s=100 * DAY, lead_s=300, step_s=5).seconds > 5000


def test_whatever_it_costs_the_interval_is_between_its_bounds() -> None:
    for blocked in (1e-4, 0.1, 3, 100):
        for durable in (blocked, 10 * blocked, 1000):
            for mttf in (60, 3600, 30 * DAY):
                found = best_interval(SaveCost(blocked, durable), mttf_s=mttf, lead_s=300, step_s=2)
                least = max(durable, blocked / MOST_SHARE, 2)
                assert found.seconds >= least * 0.999
                assert found.seconds <= max(mttf, least) * 1.001
