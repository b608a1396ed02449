"""When checkpoints are written, and that one which cannot be written never ends a run before its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.recipe.schema import Checkpoint
from launcher.trainer import saving
from launcher.trainer.checkpoint.saving import Progress
from launcher.trainer.failures import SaveError
from launcher.trainer.saving import Saver
from tests.ranks import free_port

CPU = torch.device("cpu")


class Manager:
    """A checkpoint manager whose saves end as told."""

    def __init__(self, *ends: str) -> None:
        self.ends, self.saved, self.told = list(ends), [], []  # type: ignore[var-annotated]
        self.progress, self.flying, self.free, self.needs = Progress(), False, 0, None

    def in_flight(self, *, wait_s: float = 0.0) -> bool:
        return self.flying

    def free_bytes(self) -> int:
        return self.free

    def save(self, step: int, engine: Any, state: dict[str, Any], *, lanes: Any = None) -> None:
        json.dumps(state)  # it must be JSON
        self.saved.append(step)
        end = self.ends.pop(0) if self.ends else "done"
        reason, needs = ("disk full", self.needs) if end == "failed" else (None, None)
        self.told.append(SimpleNamespace(state=end, step=step, reason=reason, needs=needs))

    def poll(self) -> Any:
        return self.told.pop(0) if self.told else SimpleNamespace(state="idle", step=None, reason=None)

    def wait(self) -> Any:
        return self.told.pop() if self.told else SimpleNamespace(state="idle", step=None, reason=None)


def saver(manager: Manager, *, rank: int = 0, **keys: Any) -> Saver:
    engine = SimpleNamespace(ensure_state=lambda: None, trainer_state=lambda: {"optimizer_step": 1})
    return Saver(manager, engine, Checkpoint(**keys), step=None, rank=rank)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(now=0.0)
    now.monotonic, now.sleep = lambda: now.now, lambda s: setattr(now, "now", now.now + s)
    now.time, now.localtime, now.strftime = lambda: 3600 + now.now, time.gmtime, time.strftime
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
    clock.now = 119.0
    assert not first.wanted()
    clock.now = 121.0
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
        begin = clock.now
        while not ended and not one.wanted():
            clock.now += 1
        waits.append(clock.now - begin)
    assert waits == [10.0, 20.0, 0.0]
    assert capsys.readouterr().out.count("warning: no checkpoint was written: disk full") == 2
    assert not one.wanted()


def test_a_save_that_lacked_space_is_tried_again_when_there_is_enough_and_not_before(
    clock: SimpleNamespace, capsys: Any
) -> None:
    manager = Manager("failed", "failed", "done")
    manager.needs = 1 << 20
    one = saver(manager, every_steps=None)
    one.save(3)
    assert not one.look()
    assert "disk full. Training goes on and it is tried again as soon as there is space." in capsys.readouterr().out
    for _ in range(500):
        clock.now += 1
        assert not one.wanted()
    one.save(6)  # due by its step: that the disk is still full is no news
    assert not one.look()
    assert capsys.readouterr().out == ""
    manager.free = 2 << 20
    clock.now += saving.SPACE_LOOK_S
    assert one.wanted()
    one.save(9)
    assert one.look()
    assert not one.wanted()
    assert manager.saved == [3, 6, 9]
    assert capsys.readouterr().out == "there is space again: the checkpoint of step 9 is written\n"


def test_a_disk_that_is_full_by_another_measure_than_bytes_is_tried_by_the_clock(clock: SimpleNamespace) -> None:
    manager = Manager("failed")  # of inodes, or a quota: bytes are free
    manager.needs, manager.free = 1 << 20, 1 << 30
    one = saver(manager, every_steps=None)
    one.save(3)
    assert not one.look()
    clock.now += saving.FIRST_RETRY_S - 1
    assert not one.wanted()
    clock.now += 1
    assert one.wanted()


def test_silence_of_storage_is_said_once_with_its_beginning_and_its_end(clock: SimpleNamespace, capsys: Any) -> None:
    manager = Manager()
    one, manager.flying = saver(manager), True
    manager.progress.doing, manager.progress.since = "writing rank-00000.safetensors", 5.0
    for now in (34.0, 36.0, 50.0):
        clock.now = now
        one.look()
    said = "since 01:00:05, for 31 s: a checkpoint is writing rank-00000.safetensors. Training goes on."
    assert capsys.readouterr().out == f"warning: storage has not answered {said}\n"
    manager.progress.since = 64.0
    clock.now = 65.0
    one.look()
    one.look()
    assert capsys.readouterr().out == "storage answers again, after 60 s\n"


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
