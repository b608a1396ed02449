"""Which checkpoints stay, and that a crash while others go leaves nothing that counts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.run import ledger
from launcher.trainer.checkpoint import retention
from launcher.trainer.checkpoint.reader import MARKER
from tests.trainer.checkpoint import rigs


def steps(run) -> list[int]:
    return [ref.step for ref in ledger.valid_checkpoints(run)]


def save_steps(path: Path, *wanted: int, **options) -> tuple[object, object]:
    run, attempt = rigs.begin(path)
    manager = rigs.manager(run, attempt, **options)
    for step in wanted:
        rigs.saved(manager, step, rigs.FlatEngine(rigs.OddShapes()))
    return run, manager


def test_the_newest_are_kept(tmp_path):
    run, _ = save_steps(tmp_path, 1, 2, 3, 4, 5, keep_last=2)
    assert steps(run) == [4, 5]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000004-a1", "step-00000005-a1"]


def test_multiples_of_keep_every_steps_are_kept_as_well(tmp_path):
    run, _ = save_steps(tmp_path, *range(1, 12), keep_last=1, keep_every_steps=4)
    assert steps(run) == [4, 8, 11]


def test_checkpoints_accepted_from_older_attempts_count(tmp_path):
    save_steps(tmp_path, 1, 2, keep_last=2)
    run, _ = save_steps(tmp_path, 3, keep_last=2)
    assert [ref.path.name for ref in ledger.valid_checkpoints(run)] == ["step-00000002-a1", "step-00000003-a2"]


def test_the_last_good_checkpoint_outlives_newer_bad_ones(tmp_path):
    """keep_last counts good ones only: step 2 is found bad, so step 1 stays until step 3 is durable."""
    run, _ = save_steps(tmp_path, 1, 2, keep_last=2)
    (run.checkpoint(2, 1) / "rank-00000.safetensors").write_bytes(b"")
    run, attempt = rigs.begin(tmp_path)
    manager = rigs.manager(run, attempt, keep_last=1)
    engine = rigs.FlatEngine(rigs.OddShapes())
    assert manager.load_latest(engine) == {"step": 1}
    assert steps(run) == [1, 2]
    rigs.saved(manager, 3, engine)
    assert steps(run) == [3]


def test_nothing_is_deleted_while_none_is_known_to_be_good(tmp_path):
    run, _ = save_steps(tmp_path, 1, 2)
    names = {ref.path.name for ref in ledger.valid_checkpoints(run)}
    assert retention.retain(run, attempt=1, keep_last=1, keep_every_steps=None, bad=names) == []
    assert steps(run) == [1, 2]


def test_a_new_attempt_removes_what_older_ones_left_unfinished_or_void(tmp_path):
    run, _ = save_steps(tmp_path, 1)
    unfinished = run.checkpoint(2, 1)
    unfinished.mkdir()
    run, attempt = rigs.begin(tmp_path)
    void = run.checkpoint(9, 1)  # as a cut-off node would commit it
    shutil.copytree(run.checkpoint(1, 1), void)
    newer = run.checkpoint(4, 7)
    newer.mkdir()
    other = run.checkpoints / "notes"
    other.mkdir()
    assert steps(run) == [1]
    rigs.manager(run, attempt).load_latest(rigs.FlatEngine(rigs.OddShapes()))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["notes", "step-00000001-a1", newer.name]


def test_a_stale_attempt_deletes_nothing(tmp_path):
    run, _ = save_steps(tmp_path, 1, 2, keep_last=2)
    rigs.begin(tmp_path)
    assert retention.retain(run, attempt=1, keep_last=1, keep_every_steps=None) == []
    assert steps(run) == [1, 2]


def test_L7_a_crash_in_retention_leaves_no_half_checkpoint_that_counts(tmp_path, monkeypatch):
    run, _ = save_steps(tmp_path, 1, 2, 3, keep_last=3)

    def crash(folder):
        (folder / "rank-00000.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            retention.retain(run, attempt=1, keep_last=1, keep_every_steps=None)
    half = run.checkpoint(1, 1)
    assert half.exists()
    assert not (half / MARKER).exists()
    assert steps(run) == [2, 3]

    run, attempt = rigs.begin(tmp_path)
    loader = rigs.manager(run, attempt)
    assert loader.load_latest(rigs.FlatEngine(rigs.OddShapes())) == {"step": 3}
    assert loader.problems == []
    assert not half.exists()


def test_a_checkpoint_that_cannot_be_removed_is_told_and_the_save_counts(tmp_path, monkeypatch):
    run, manager = save_steps(tmp_path, 1, keep_last=1)

    def refuses(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    manager.save(2, rigs.FlatEngine(rigs.OddShapes()), {})
    status = manager.wait()
    assert status.state == "done"
    assert "an old checkpoint could not be removed" in str(status.reason)
    assert steps(run) == [2]
