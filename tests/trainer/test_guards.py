"""What becomes of steps with wrong figures: pure, the same for the same figures, and exact over a checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from launcher.trainer.failures import NonFiniteError, RollBack, SpikeError
from launcher.trainer.guards import Guards, Judged


def learnt(guards: Guards, losses: list[float], *, first: int = 1) -> None:
    """Judge losses that nothing is wrong with."""
    for step, loss in enumerate(losses, first):
        assert guards.judge(step, loss, nonfinite=False) == Judged()


def noisy(count: int, *, middle: float = 3.0, sigma: float = 0.1) -> list[float]:
    return (middle + sigma * np.random.default_rng(0).standard_normal(count)).tolist()


def test_a_loss_far_above_the_median_is_a_spike_and_one_below_never_is():
    guards = Guards(window=16)
    learnt(guards, noisy(20))
    assert guards.judge(21, 0.01, nonfinite=False) == Judged()
    assert guards.judge(22, 6.0, nonfinite=False) == Judged("spike")
    assert guards.counts() == {"loss_spikes": 1}


def test_nothing_is_a_spike_before_there_is_a_history_and_nothing_at_all_where_they_are_ignored():
    guards = Guards(window=64)
    learnt(guards, [1.0] * 15 + [50.0])  # a quarter of the window is 16
    ignored = Guards(on_spike="ignore", window=8)
    learnt(ignored, [*noisy(30), 1e9])


def test_ten_thousand_steps_of_falling_and_noisy_losses_raise_no_alarm():
    chance = np.random.default_rng(1)
    fall = 2.0 + 8.0 * np.exp(-np.arange(10_000) / 200)
    learnt(Guards(), (fall * (1 + 0.05 * chance.standard_normal(10_000))).tolist())


def test_losses_that_hardly_move_make_no_small_rise_a_spike():
    guards = Guards(window=16)
    learnt(guards, [2.0] * 20)
    assert guards.limit(21) == pytest.approx(2.0 + 8 * 0.01 * 2.0)
    assert guards.judge(21, 2.1, nonfinite=False) == Judged()
    assert guards.judge(22, 2.5, nonfinite=False) == Judged("spike")


def test_spikes_in_the_window_do_not_hide_the_next_one_as_a_mean_would():
    guards = Guards(window=16)
    learnt(guards, noisy(20))
    assert [guards.judge(step, 100.0, nonfinite=False).reason for step in range(21, 26)] == ["spike"] * 5


def test_a_level_that_stays_high_is_learnt_and_no_spike_any_more():
    guards = Guards(window=16)
    learnt(guards, noisy(20))
    found = [guards.judge(step, 6.0 + loss, nonfinite=False).reason for step, loss in enumerate(noisy(30), 21)]
    assert found[0] == "spike"
    assert found[-1] is None


def test_the_limit_of_a_step_rests_on_what_is_known_when_it_is_sent():
    """Two steps before: whether a checkpoint was written in between changes nothing."""
    guards = Guards(window=8)
    learnt(guards, noisy(12))
    before = guards.limit(14)
    learnt(guards, [0.5], first=13)
    assert guards.limit(14) == before
    assert guards.limit(15) != before


def test_skipping_counts_and_a_good_step_ends_the_row():
    guards = Guards(on_nonfinite="skip", max_skips=3)
    for step in (1, 2):
        assert guards.judge(step, math.nan, nonfinite=True) == Judged("non_finite", skipped=True)
    learnt(guards, [1.0], first=3)
    assert guards.judge(4, math.nan, nonfinite=True).skipped
    assert (guards.skipped, guards.in_a_row, guards.row) == (3, 1, [4])


def test_f30_so_many_skips_in_a_row_go_back_without_their_batches_and_one_more_ends_the_run():
    guards = Guards(on_nonfinite="skip", max_skips=2)
    learnt(guards, [1.0, 1.0])
    assert guards.judge(3, math.nan, nonfinite=True).skipped
    with pytest.raises(RollBack, match=r"max_skips = 2.*back to the last checkpoint, without them") as back:
        guards.judge(4, math.nan, nonfinite=True)
    assert back.value.steps == [3, 4]
    again = Guards(on_nonfinite="skip", max_skips=2)
    learnt(again, [1.0, 1.0])
    again.leave()
    again.leave()
    with pytest.raises(NonFiniteError, match="the 2 global batches before it made no update either"):
        again.judge(5, math.nan, nonfinite=True)


def test_rollback_leaves_out_one_batch_and_ends_where_too_many_in_a_row_are_left_out():
    guards = Guards(on_nonfinite="rollback", max_skips=2)
    for left in range(2):
        with pytest.raises(RollBack) as back:
            guards.judge(1 + left, math.nan, nonfinite=True)
        assert (back.value.steps, back.value.reason) == ([1 + left], "non_finite")
        guards = Guards(on_nonfinite="rollback", max_skips=2)
        for _ in range(left + 1):
            guards.leave()
    with pytest.raises(NonFiniteError):
        guards.judge(3, math.nan, nonfinite=True)


def test_each_action_on_a_spike():
    def judged(action: str) -> Judged:
        guards = Guards(on_spike=action, window=8)  # type: ignore[arg-type]
        learnt(guards, noisy(12))
        return guards.judge(13, 30.0, nonfinite=False)

    assert judged("warn") == Judged("spike")
    assert judged("skip") == Judged("spike", skipped=True)
    with pytest.raises(SpikeError, match=r"step 13: loss 30\.0000 is a spike"):
        judged("stop")
    with pytest.raises(RollBack) as back:
        judged("rollback")
    assert (back.value.reason, back.value.loss, back.value.limit is not None) == ("spike", 30.0, True)


def test_nonfinite_stops_by_default_and_says_what_to_do():
    with pytest.raises(NonFiniteError, match=r"train\.on_nonfinite=skip"):
        Guards().judge(1, math.inf, nonfinite=True)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_l4_guards_that_go_on_from_a_checkpoint_judge_as_those_that_never_stopped(cut):
    losses = noisy(60)
    losses[30] = losses[31] = losses[50] = 40.0
    bad = {20, 40}

    def run(guards: Guards, steps: range) -> list[tuple[float, Judged]]:
        return [
            (guards.limit(step), guards.judge(step, losses[step], nonfinite=step in bad)) for step in steps
        ]  # fmt: skip

    def make() -> Guards:
        return Guards(on_nonfinite="skip", on_spike="skip", window=12)

    whole = make()
    expected = run(whole, range(1, 60))
    before, after = make(), make()
    found = run(before, range(1, cut))
    after.load(json.loads(json.dumps(before.state())))
    assert found + run(after, range(cut, 60)) == expected
    assert after.state() == whole.state()


def test_a_checkpoint_of_before_0_5_begins_anew():
    guards = Guards()
    guards.load({})
    assert (list(guards.losses), guards.counts()) == ([], {})
