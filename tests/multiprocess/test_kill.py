"""L4 under fire: ranks are killed at random moments, saves included, and the run ends as if nothing had happened."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from launcher.jobs.agent import RankProcess
from launcher.jobs.console import Console
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from tests.jobs.make import losses, project, run_of, tensors_of

KILLS = 50
STEPS = 20


class Killer:
    """Sends SIGKILL to a random rank of the next attempt, `delay_s` after its ranks have been started."""

    def __init__(self, chance: random.Random, delay_s: float) -> None:
        self._first, self._rank, self._delay_s = len(RankProcess.started), chance.randrange(2), delay_s
        self._over = threading.Event()
        self.killed = False
        self._thread = threading.Thread(target=self._hunt, daemon=True)
        self._thread.start()

    def _hunt(self) -> None:
        while len(RankProcess.started) < self._first + 2:
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
    assert code == 0, said
    assert_same_training(run_of(recipe, "again"), whole)
    longest_s = time.monotonic() - begun
    chance, kills, number = random.Random(f"kill-{asynchronous}"), 0, 0
    while kills < KILLS // 2:
        name, code = f"shot-{number}", 1
        while code != 0:
            killer = Killer(chance, chance.uniform(0, longest_s)) if kills < KILLS // 2 else None
            code, said = attempt(recipe, name, killer=killer)
            assert code == 0 or (killer is not None and killer.killed), said
            kills += code != 0
        assert_same_training(run_of(recipe, name), whole)
        number += 1
    runs = [run_of(recipe, f"shot-{i}") for i in range(number)]
    assert sum(len(attempts(run)) for run in runs) == kills + number
