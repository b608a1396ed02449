"""Launches that are killed or asked to stop at any moment, under a warm launcher: F1 and F2 as a whole, F12."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.faults.killing import Ground, Hunt, Scene, make_project
from tests.faults.recorder import PHASES
from tests.jobs.make import run_of

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

SCENES = [
    Scene("fsdp2", 2, asynchronous=True, rehearse=True),
    Scene("ddp", 3, every_steps=2),
    Scene("zero2", 2, every_steps=2),
]
GRACE_S = 30.0  # what Kubernetes gives a pod


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("kills")
    ground = Ground(folder / "lane", make_project(folder))
    yield ground
    ground.lane.close()


def hunted(ground: Ground, *, kills: int, seed: str, who: tuple[int, int, int, int]) -> None:
    """So many kills by which nothing became unloadable or inexact, half of them inside saves."""
    tally = Hunt(ground, SCENES, seed=seed, who=who).go_on(lambda tally: tally.total >= kills)
    assert tally.broken == []
    assert tally.total >= kills
    print(
        f"{tally.total} kills, {tally.inside()} inside saves, {tally.runs} runs, {tally.checked} checkpoints compared"
    )
    assert 3 * tally.inside() >= tally.total


def test_F01_sigkill_of_one_rank_or_of_the_launcher_at_random_times_under_real_launches(ground):
    """F1: one rank, the launcher, or it and all below it die at random times, half of them inside a save: the run goes
    on by itself or by the next start from the newest checkpoint, every row, figure, weight and moment as without."""
    hunted(ground, kills=12, seed="F01", who=(80, 0, 10, 10))


def test_F02_sigkill_of_all_ranks_together_at_random_points_loses_at_most_one_interval(ground):
    """F2: all ranks die together at random points of the run, half of them inside a save: the newest checkpoint is
    whole, at most one interval is lost, and the run ends with the rows, figures, weights and moments of one that
    nobody disturbed."""
    hunted(ground, kills=20, seed="F02", who=(0, 100, 0, 0))


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_F02_matrix_100_times(ground):
    """F2 at its full length."""
    hunted(ground, kills=100, seed="F02-matrix", who=(0, 100, 0, 0))


@pytest.mark.parametrize("scene", [SCENES[0], SCENES[2]], ids=lambda scene: scene.kind)
def test_F12_sigterm_in_every_phase_saves_within_the_grace_time_says_preempted_and_resumes_exactly(ground, scene):
    """F12: SIGTERM while data are read, in forward, backward, optimizer and save, to the launcher and to a rank: a
    durable checkpoint of the last step within the grace time, exit code 75, and an exact resume."""
    name, lane = f"f12-{scene.kind}", ground.lane
    run, changes = run_of(ground.recipe, name), (f"run.name={name}", *scene.changes, "checkpoint.keep_last=20")
    ground.whole(scene)  # not within the grace time
    begun = 0
    for number, phase in enumerate(PHASES):
        at = {"run": str(run.path), "phase": phase, "step": 1, "rank": number % 2}
        (lane.rows / "signal").write_text(json.dumps({**at, "to": ("launcher", "rank")[number % 2]}))
        code, said = lane.finish(ground.recipe, *changes)
        signalled = lane.rows / "signaled"
        taken_s = time.time() - signalled.stat().st_ctime
        signalled.unlink()
        assert code == 75, (phase, said)
        assert taken_s < GRACE_S, f"{phase}: {taken_s:.0f} s"
        newest, last = valid_checkpoints(run)[-1], attempts(run)[-1]
        assert (last.end_class, last.end_step) == ("preemption", newest.step), phase
        assert read_state(run).status == "preempted"
        assert newest.step > begun, phase
        begun = newest.step
    code, said = lane.finish(ground.recipe, *changes)
    assert code == 0, said
    assert ground.differences(name, scene) == []
    ground.forget(name)
