"""How a run chooses the time between its saves: from the rehearsal at first, then from what saves really cost."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from launcher.plan.saving import SaveCost
from launcher.recipe.schema import Checkpoint
from launcher.trainer import saving
from launcher.trainer.interval import UNKNOWN_S, SaveInterval
from tests.trainer.test_saving import Manager

DAY = 86400.0


def stepped(interval: SaveInterval, steps: int, *, step_s: float, begin: float = 0.0, last: float = 0.0) -> list[float]:
    """When it is due in so many steps of that length, a save being made whenever it is."""
    due = []
    for i in range(steps):
        now = begin + i * step_s
        if interval.due(now, since=last):
            last = now
            due.append(now)
    return due


def test_saves_come_at_the_chosen_time_from_the_first_step_on(capsys) -> None:
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=SaveCost(0.1, 1.0))  # 131 s by Young
    due = stepped(interval, 1000, step_s=2.0)
    assert len(due) == 15
    assert due[0] == pytest.approx(132, abs=2)
    assert {round(b - a) for a, b in pairwise(due)} == {132}
    told = interval.told()
    assert told is not None
    assert told["steps"] == 66
    assert capsys.readouterr().out.startswith("checkpoints: every 131 s, about 66 steps: the optimum of Young and Daly")


def test_what_real_saves_cost_moves_it_and_each_move_is_said_with_its_reason(capsys) -> None:
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=SaveCost(0.1, 1.0))
    stepped(interval, 5, step_s=2.0)
    capsys.readouterr()
    interval.measured(blocked_s=0.105, durable_s=1.1)
    assert capsys.readouterr().out == "", "a change of a few percent is not worth a line"
    for _ in range(3):
        interval.measured(blocked_s=10.0, durable_s=20.0)
    out = capsys.readouterr().out
    assert "(was 131 s)" in out
    assert interval.chosen is not None
    assert interval.chosen.seconds == pytest.approx(1315, rel=0.02)


def test_one_save_that_took_long_does_not_move_it() -> None:
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=None)
    for blocked in (0.1, 0.1, 60.0, 0.1):
        interval.measured(blocked_s=blocked, durable_s=1.0)
    assert interval.chosen is not None
    assert interval.chosen.seconds == pytest.approx(131, rel=0.02)


def test_where_nothing_was_measured_the_first_save_comes_soon_and_is_the_measurement() -> None:
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=None)
    assert interval.told() is None
    (first, *_) = stepped(interval, 100, step_s=1.0)
    assert first == UNKNOWN_S


def test_the_time_of_a_step_is_not_moved_by_steps_that_stood_still() -> None:
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=SaveCost(0.1, 1.0))
    now = 0.0
    for i in range(40):
        now += 50.0 if i % 10 == 9 else 1.0
        interval.due(now, since=now)
    assert interval.step_s == 1.0


def test_rank_0_wishes_a_save_when_it_pays_and_steps_that_are_kept_for_good_are_saved_besides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = SimpleNamespace(now=0.0)
    now.monotonic = lambda: now.now
    monkeypatch.setattr(saving, "time", now)
    engine = SimpleNamespace(ensure_state=lambda: None, trainer_state=dict)
    keys = Checkpoint(every_steps="auto", mttf_hours=24, keep_every_steps=50)
    interval = SaveInterval(mttf_s=DAY, lead_s=300, cost=SaveCost(0.1, 1.0))
    first, other = (
        saving.Saver(Manager(), engine, keys, step=None, rank=rank, interval=interval if rank == 0 else None)  # type: ignore[arg-type]
        for rank in (0, 1)
    )
    assert (
        [step for step in range(1, 120) if first.due(step)] == [50, 100] == [s for s in range(1, 120) if other.due(s)]
    )
    wished = []
    for step in range(1, 301):
        now.now += 1.0
        assert not other.wanted()
        if first.wanted():
            wished.append(step)
            first.save(step)
    assert [b - a for a, b in pairwise([0, *wished])] == pytest.approx([132, 132], abs=2)
