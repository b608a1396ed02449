"""When checkpoints are written, and that one which cannot be written never ends a run before its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.recipe.schema import Checkpoint
from launcher.trainer import saving
from launcher.trainer.failures import SaveError
from launcher.trainer.saving import Saver
from tests.ranks import free_port

CPU = torch.device("cpu")


class Manager:
    """A checkpoint manager whose saves end as told."""

    def __init__(self, *ends: str) -> None:
        self.ends, self.saved, self.told = list(ends), [], []  # type: ignore[var-annotated]

    def save(self, step: int, engine: Any, state: dict[str, Any], *, lanes: Any = None) -> None:
        json.dumps(state)  # it must be JSON
        self.saved.append(step)
        end = self.ends.pop(0) if self.ends else "done"
        self.told.append(SimpleNamespace(state=end, step=step, reason="disk full" if end == "failed" else None))

    def poll(self) -> Any:
        return self.told.pop(0) if self.told else SimpleNamespace(state="idle", step=None, reason=None)

    def wait(self) -> Any:
        return self.told.pop() if self.told else SimpleNamespace(state="idle", step=None, reason=None)


def saver(manager: Manager, *, rank: int = 0, **keys: Any) -> Saver:
    engine = SimpleNamespace(ensure_state=lambda: None, trainer_state=lambda: {"optimizer_step": 1})
    return Saver(manager, engine, Checkpoint(**keys), step=None, rank=rank)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(monotonic=lambda: now.time, sleep=lambda s: setattr(now, "time", now.time + s), time=0.0)
    monkeypatch.setattr(saving, "time", now)
    return now


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_saves_are_due_by_steps_on_every_rank_and_by_minutes_on_rank_0(clock: SimpleNamespace) -> None:
    keys = {"every_steps": 5, "every_minutes": 2.0}
    first, other = saver(Manager(), **keys), saver(Manager(), rank=1, **keys)
    assert [s for s in range(1, 12) if first.due(s) and other.due(s)] == [5, 10]
    clock.time = 119.0
    assert not first.wanted()
    clock.time = 121.0
    assert first.wanted()
    assert not other.wanted()
    first.save(7)
    assert not first.wanted()


def test_a_failed_save_is_said_tried_again_after_a_while_and_ever_later(clock: SimpleNamespace, capsys: Any) -> None:
    one = saver(Manager("failed", "failed", "done"), every_steps=None)
    waits = []
    for step in (3, 5, 8):
        one.save(step)
        ended = one.look()
        begin = clock.time
        while not ended and not one.wanted():
            clock.time += 1
        waits.append(clock.time - begin)
    assert waits == [10.0, 20.0, 0.0]
    assert capsys.readouterr().out.count("warning: no checkpoint was written: disk full") == 2
    assert not one.wanted()


@pytest.mark.usefixtures("alone")
def test_the_last_checkpoint_is_tried_several_times_and_then_given_up_aloud(clock: SimpleNamespace) -> None:
    one = Manager("failed", "failed", "done")
    saver(one).save_durably(9, CPU)
    assert one.saved == [9, 9, 9]
    with pytest.raises(SaveError, match="step 9: no checkpoint could be written in 4 tries: disk full"):
        saver(Manager(*["failed"] * 9)).save_durably(9, CPU)


@pytest.mark.usefixtures("alone")
def test_a_step_that_is_saved_already_is_not_saved_twice_at_the_end(clock: SimpleNamespace) -> None:
    manager = Manager()
    one = saver(manager)
    one.save(4)
    one.save_durably(4, CPU)
    assert manager.saved == [4]
