"""L7: what a loader does with bad checkpoints: gaps, other formats and models, the one before, none at all.

Damages of single files, links and retention under a reader are in tests/faults/test_integrity.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.run import ledger
from launcher.trainer.checkpoint.format import CheckpointError, rank_file
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.checkpoint.verify import MANIFEST, problems, read_manifest
from tests.trainer.checkpoint import rigs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that three ranks wrote."""
    run, attempt = rigs.begin(tmp_path)
    assert rigs.save_with_ranks(run, attempt, 20, [rigs.OddShapes(seed=20)] * 3) == [""] * 3
    return run.checkpoint(20, attempt)


def test_L7_ranges_that_leave_a_gap_are_refused_although_every_hash_is_right(folder):
    """As a wrong engine would write them."""
    text = (folder / MANIFEST).read_text()
    rigs.commit(folder, text.replace('"shape": [\n    257\n', '"shape": [\n    258\n'))
    said = "long value: elements from 257 on are missing or there twice (of 258)"
    assert f"{folder.name}: {said}" in problems(folder)


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(folder):
    rigs.commit(folder, (folder / MANIFEST).read_text().replace('"version": 1,', '"version": 9,'))
    assert problems(folder) == [f"{folder.name}: format version 9; this launcher reads 1"]


@pytest.mark.parametrize("name", [rank_file(0), MANIFEST])
def test_L7_loading_names_the_bad_file_and_takes_the_checkpoint_before(tmp_path, name):
    run, attempt = rigs.begin(tmp_path)
    good = rigs.FlatEngine(rigs.OddShapes(seed=1))
    good.disturb(1)
    rigs.saved(rigs.manager(run, attempt), 10, good)
    newest = rigs.FlatEngine(rigs.OddShapes(seed=2))
    path = rigs.saved(rigs.manager(run, attempt), 20, newest) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    run, attempt = rigs.begin(tmp_path)
    loader, engine = rigs.manager(run, attempt), rigs.FlatEngine(rigs.OddShapes(seed=3))
    assert loader.load_latest(engine) == {"step": 10}
    assert rigs.same(engine.snapshot(), good.snapshot())
    assert engine.step == 10
    assert loader.loaded == "step-00000010-a1"
    assert len(loader.problems) == 1
    assert "step-00000020-a1" in loader.problems[0]
    assert name in loader.problems[0]


def test_L7_when_every_checkpoint_is_bad_loading_says_so_and_does_not_begin_anew(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    for step in (1, 2):
        folder = rigs.saved(rigs.manager(run, attempt), step, rigs.FlatEngine(rigs.OddShapes()))
        (folder / rank_file(0)).write_bytes(b"")
    run, attempt = rigs.begin(tmp_path)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is bad") as caught:
        rigs.manager(run, attempt).load_latest(rigs.FlatEngine(rigs.OddShapes()))
    assert "step-00000001-a1" in str(caught.value)
    assert "step-00000002-a1" in str(caught.value)
    assert len(ledger.valid_checkpoints(run)) == 2


def test_a_run_without_checkpoints_loads_nothing(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    assert rigs.manager(run, attempt).load_latest(rigs.FlatEngine(rigs.OddShapes())) is None


def test_a_checkpoint_of_another_model_is_an_error_and_not_a_bad_file(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    rigs.saved(rigs.manager(run, attempt), 1, rigs.FlatEngine(rigs.OddShapes()))
    with pytest.raises(CheckpointError, match=r"of another model: wide is \[7, 61\], the model's is \[7, 9\]"):
        rigs.manager(run, attempt).load_latest(rigs.FlatEngine(rigs.OddShapes(width=9)))


def test_a_reader_that_holds_its_files_survives_their_deletion(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    engine = rigs.FlatEngine(rigs.OddShapes())
    folder = rigs.saved(rigs.manager(run, attempt), 1, engine)
    reader = Reader(folder, read_manifest(folder))
    reader.open_all()
    shutil.rmtree(folder)
    assert reader.read("wide").equal(engine.module.wide.detach())
