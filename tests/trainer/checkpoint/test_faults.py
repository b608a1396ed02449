"""L7: whatever happens to the files of a checkpoint is found before use, and named; the one before it is taken."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from launcher.run import ledger
from launcher.trainer.checkpoint.format import CheckpointError, rank_file
from launcher.trainer.checkpoint.reader import (
    MANIFEST,
    MARKER,
    Reader,
    marker_text,
    read_manifest,
    read_table,
    verify_files,
)  # fmt: skip
from tests.trainer.checkpoint import rigs

RANKS = 3


def problems_of(folder: Path) -> str:
    """What a loader would say of a folder; empty when it is good."""
    try:
        manifest = read_manifest(folder, run_id="this-run")
        found = verify_files(folder, manifest, range(len(manifest["files"])))
        if not found:
            read_table(folder, manifest)
    except CheckpointError as error:
        return str(error)
    return "\n".join(found)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Folders of steps 10 and 20, each written by three ranks."""
    run, attempt = rigs.begin(tmp_path)
    for step in (10, 20):
        assert rigs.save_with_ranks(run, attempt, step, [rigs.OddShapes(seed=step)] * RANKS) == [""] * RANKS
    folders = [run.checkpoint(step, attempt) for step in (10, 20)]
    assert [problems_of(folder) for folder in folders] == ["", ""]
    return folders


def test_L7_every_flipped_bit_is_found_and_its_file_is_named(checkpoints):
    """200 bits at random places over all files, those of manifest and marker included."""
    folder, rng = checkpoints[1], random.Random(7)
    files = sorted(folder.iterdir())
    offsets = [(path, at) for path in files for at in range(path.stat().st_size)]
    weights = [1 / path.stat().st_size for path, _ in offsets]  # each file as often as any other
    for path, at in rng.choices(offsets, weights, k=200):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert path.name in problems_of(folder), (path.name, at)
        path.write_bytes(content)
    assert problems_of(folder) == ""


@pytest.mark.parametrize("name", [rank_file(0), rank_file(2), MANIFEST, MARKER])
def test_L7_a_file_truncated_to_any_of_20_lengths_is_named(checkpoints, name):
    path = checkpoints[1] / name
    content = path.read_bytes()
    for i in range(20):
        path.write_bytes(content[: i * len(content) // 20])
        assert name in problems_of(checkpoints[1]), i
    path.write_bytes(content + b"\0")
    assert name in problems_of(checkpoints[1])


@pytest.mark.parametrize("name", [rank_file(1), MANIFEST, MARKER])
def test_L7_a_missing_file_is_named(checkpoints, name):
    (checkpoints[1] / name).unlink()
    assert f"{name}: No such file" in problems_of(checkpoints[1])


def test_L7_files_swapped_between_ranks_say_whose_they_are(checkpoints):
    one, two, aside = (checkpoints[1] / name for name in (rank_file(0), rank_file(1), "aside"))
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    found = problems_of(checkpoints[1]).splitlines()
    assert f"{rank_file(0)}: is the file of rank 1, step 20" in found[0]
    assert f"{rank_file(1)}: is the file of rank 0, step 20" in found[1]


def test_L7_a_file_of_another_step_says_which(checkpoints):
    shutil.copy(checkpoints[0] / rank_file(1), checkpoints[1] / rank_file(1))
    assert f"{rank_file(1)}: is the file of rank 1, step 10" in problems_of(checkpoints[1])


def test_L7_a_file_too_many_is_refused(checkpoints):
    shutil.copy(checkpoints[0] / rank_file(1), checkpoints[1] / rank_file(7))
    assert f"{rank_file(7)}: does not belong to this checkpoint" in problems_of(checkpoints[1])


def test_L7_a_manifest_of_another_step_is_refused_even_with_its_marker(checkpoints):
    for name in (MANIFEST, MARKER):
        shutil.copy(checkpoints[0] / name, checkpoints[1] / name)
    assert f"{MANIFEST} is that of step 10" in problems_of(checkpoints[1])


def test_L7_a_checkpoint_of_another_run_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="belongs to run this-run, not to that-run"):
        read_manifest(checkpoints[1], run_id="that-run")


def test_L7_ranges_that_leave_a_gap_are_refused_although_every_hash_is_right(checkpoints):
    """As a wrong engine would write them."""
    folder = checkpoints[1]
    text = (folder / MANIFEST).read_text().replace('"shape": [\n    257\n', '"shape": [\n    258\n')
    (folder / MANIFEST).write_text(text)
    (folder / MARKER).write_text(marker_text(text.encode()))
    assert "long value: elements from 257 on are missing or there twice (of 258)" in problems_of(folder)


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(checkpoints):
    folder = checkpoints[1]
    text = (folder / MANIFEST).read_text().replace('"version": 1,', '"version": 9,')
    (folder / MANIFEST).write_text(text)
    (folder / MARKER).write_text(marker_text(text.encode()))
    assert problems_of(folder).endswith("format version 9; this launcher reads 1")


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
