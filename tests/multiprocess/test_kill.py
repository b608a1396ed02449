"""L4 under fire: ranks are killed at random moments, saves included, and the run ends as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.jobs.agent import RankProcess
from launcher.jobs.console import Console
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from tests.jobs.make import losses, project, run_of, tensors_of

KILLS = 20  # tests/trainer/checkpoint/test_kill.py sends fifty to ranks without a launcher
STEPS = 12


@dataclass(frozen=True)
class Pace:
    """How long a warm attempt takes here, in seconds: until its first step, and for each step with its save."""

    start_s: float
    step_s: float


class Killer:
    """Sends SIGKILL to a random rank of a run's next attempt: while it starts, or in or after any step it has to do.

    The moment is drawn as a step and a share of its time, so that it hits as well where the machine is slow.
    """

    def __init__(self, chance: random.Random, run: RunDirectory, reached: int, pace: Pace) -> None:
        self._first, self._rank = len(RankProcess.started), chance.randrange(2)
        self._run, steps = run, chance.randint(0, STEPS - reached)
        self._lines = lines(run) + steps
        self._delay_s = chance.uniform(0, pace.step_s if steps else pace.start_s)
        self._over = threading.Event()
        self.killed = False
        self._thread = threading.Thread(target=self._hunt, daemon=True)
        self._thread.start()

    def _hunt(self) -> None:
        while len(RankProcess.started) < self._first + 2:
            if self._over.wait(0.005):
                return
        while lines(self._run) < self._lines:
            if self._over.wait(0.005):
                return
        if self._over.wait(self._delay_s):
            return
        try:
            os.kill(RankProcess.started[self._first + self._rank].pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            return  # it had just ended
        self.killed = True

    def rest(self) -> None:
        self._over.set()
        self._thread.join()


def lines(run: RunDirectory) -> int:
    """Steps that all attempts of a run have written."""
    return run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0


def reached(run: RunDirectory) -> int:
    """The step at which the next attempt begins."""
    return max((checkpoint.step for checkpoint in valid_checkpoints(run)), default=0)


def pace_of(run: RunDirectory, whole_s: float) -> Pace:
    """From a run of one attempt that took `whole_s`."""
    times = [json.loads(line)["time"] for line in run.metrics_file.read_text().splitlines()]
    step_s = (times[-1] - times[0]) / (len(times) - 1)
    return Pace(start_s=max(0.0, whole_s - step_s * len(times)), step_s=step_s)


def attempt(recipe_file: Path, name: str, *changes: str, killer: Killer | None = None) -> tuple[int, str]:
    """One `launcher run` in this process, whose fork server stays warm; its exit code and what it said."""
    said = io.StringIO()
    try:
        code = launch(load(recipe_file, [f"run.name={name}", *changes]).recipe, force=False, console=Console(said))
    finally:
        if killer is not None:
            killer.rest()
    return code, said.getvalue()


def assert_same_training(run: RunDirectory, whole: RunDirectory) -> None:
    ours, theirs = losses(run), losses(whole)
    assert ours == {step: theirs[step] for step in ours}
    assert STEPS in ours
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_l4_ranks_killed_at_random_moments_and_in_saves_leave_losses_and_weights_bit_equal(tmp_path, asynchronous):
    """Half of the kills with synchronous and half with asynchronous saves, a checkpoint after every step."""
    recipe = project(
        tmp_path,
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 1, "keep_last": 2, "async_save": asynchronous},
        strategy={"kind": "fsdp2"},
    )
    code, said = attempt(recipe, "whole")
    assert code == 0, said
    whole, begun = run_of(recipe, "whole"), time.monotonic()
    code, said = attempt(recipe, "again")  # warm now, as every attempt after it
    pace = pace_of(run_of(recipe, "again"), time.monotonic() - begun)
    assert code == 0, said
    assert_same_training(run_of(recipe, "again"), whole)
    chance, kills, number = random.Random(f"kill-{asynchronous}"), 0, 0
    while kills < KILLS // 2:
        run, code = run_of(recipe, f"shot-{number}"), 1
        while code != 0:
            killer = None
            if kills < KILLS // 2 and reached(run) < STEPS:
                killer = Killer(chance, run, reached(run), pace)
            code, said = attempt(recipe, run.name, killer=killer)
            assert code == 0 or (killer is not None and killer.killed), said
            kills += code != 0
        assert_same_training(run, whole)
        number += 1
    runs = [run_of(recipe, f"shot-{i}") for i in range(number)]
    assert sum(len(attempts(run)) for run in runs) == kills + number
