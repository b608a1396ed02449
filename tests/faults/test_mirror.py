"""The slower, durable copy of a run under kills and losses: a half upload, a lost directory, a lost and a bad file."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.console import Console
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.recipe.schema import Checkpoint
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.trainer.checkpoint import mirroring
from launcher.trainer.checkpoint.format import rank_file
from launcher.trainer.checkpoint.verify import problems
from tests import ranks
from tests.faults.shim import CHANGES, Shim
from tests.jobs.make import losses, project, run_of, tensors_of
from tests.trainer.checkpoint import rigs

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def copy_once(path: Path, place: Path) -> None:
    """Copy what is there and end."""
    with mirroring.mirrored(RunDirectory(path), Checkpoint(mirror=str(place), keep_last=1), print):
        pass


def test_F03_sigkill_before_every_call_of_an_upload(shimmed: Shim, tmp_path: Path):
    """F3: SIGKILL before every single call with which a checkpoint is copied to the mirror and an older copy removed:
    what counts there is whole at each moment, the run can be restored from it, and the next copy completes it."""
    run, attempt = rigs.begin(tmp_path / "run")
    run.run_file.write_text(json.dumps({"run_id": "this-run"}))
    for step in (1, 2):
        assert rigs.save_with_ranks(run, attempt, step, [rigs.OddShapes(seed=step)] * 2) == ["", ""]
    first = RunDirectory(tmp_path / "first")
    shutil.copytree(run.path, first.path)
    shutil.rmtree(first.checkpoint(2, 1))
    copy_once(first.path, tmp_path / "begun" / "{run}")
    nth, newest = 0, set()
    while True:
        nth += 1
        place = tmp_path / f"mirror-{nth}"
        shutil.copytree(tmp_path / "begun" / "first", place / "run")
        rule = shimmed.rule(*CHANGES, path=place, nth=nth, kill=True)
        process = ranks.context().Process(target=copy_once, args=(run.path, place))
        process.start()
        process.join(120)
        shimmed.clear()
        back = RunDirectory(tmp_path / f"back-{nth}" / "run")
        mirroring.restore(back, Checkpoint(mirror=str(place)), print)
        (ref,) = valid_checkpoints(back)
        assert problems(ref.path, run_id="this-run") == [], nth
        newest.add(ref.step)
        if process.exitcode == 0:
            assert rule.calls == nth - 1
            break
        assert process.exitcode == -9
        if nth % 5 == 1:
            copy_once(run.path, place)
            found = sorted(path.parent.name for path in place.glob(f"run/checkpoints/*/{MARKER}"))
            assert found == ["step-00000002-a1"]
            assert problems(place / "run" / "checkpoints" / found[0], run_id="this-run") == []
    print(f"{nth - 1} calls")
    assert nth > 20
    assert newest == {1, 2}


def train(recipe: Path, *changes: str) -> str:
    said = io.StringIO()
    code = launch(load(recipe, changes).recipe, force=False, console=Console(said))
    assert code == 0, said.getvalue()
    return said.getvalue()


def test_F11_a_run_goes_on_exactly_from_its_mirror_when_its_directory_is_lost(tmp_path: Path):
    """F11: the fast tier is lost: the whole run directory, then its newest checkpoint, then a byte of one; each time
    the run on two ranks goes on from the mirror bit-equal, and the mirror is complete before `finished` is said."""
    changes: dict[str, Any] = {
        "train": {"max_steps": 4}, "optimizer": {"schedule": "constant", "warmup_steps": 0},
        "checkpoint": {"rehearse": False, "keep_last": 2, "mirror": str(tmp_path / "mirror")},
        "cluster": {"preflight": False},
    }  # fmt: skip
    recipe = project(tmp_path, **changes)
    train(recipe, "run.name=whole", "train.max_steps=10", "checkpoint.mirror=null")
    whole, run = run_of(recipe, "whole"), run_of(recipe)

    said = train(recipe)
    place = tmp_path / "mirror" / "tiny"
    assert said.index(f"mirror: step-00000004-a1 and the run's records are in {place}") < said.index(
        "finished at step 4"
    )
    shutil.rmtree(run.path)
    said = train(recipe, "train.max_steps=6")
    assert f"mirror: {run.path} was not here and is restored from {place}" in said
    assert "resumed at step 4 of 6" in said
    assert [attempt.accepts for attempt in attempts(run)] == [(), ("step-00000004-a1",)]

    shutil.rmtree(run.checkpoint(6, 2))
    said = train(recipe, "train.max_steps=8")
    assert f"mirror: restored step-00000006-a2 (2 files, verified) from {place}" in said
    assert "resumed at step 6 of 8" in said

    shard = run.checkpoint(8, 3) / rank_file(1)
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    said = train(recipe, "train.max_steps=10")
    assert f"step-00000008-a3/{rank_file(1)} was bad and is replaced by its copy in {place}" in said
    assert "resumed at step 8 of 10" in said

    expected = losses(whole)
    assert losses(run) == {step: expected[step] for step in range(5, 11)}, "figures of the lost directory are lost"
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)
