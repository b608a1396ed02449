"""Damaged files of a checkpoint, and files that go while they are read: F7, F8, F9, F10, F11."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.console import Console
from launcher.jobs.opening import stored_recipe
from launcher.jobs.supervisor import launch
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import valid_checkpoints
from launcher.trainer.checkpoint import retention
from launcher.trainer.checkpoint.format import rank_file
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.checkpoint.retention import Hold, retain
from launcher.trainer.checkpoint.verify import MANIFEST, CheckpointError, problems, read_manifest
from tests import ranks
from tests.faults import damage
from tests.faults.shim import CHANGES, Shim
from tests.jobs.make import losses, project, run_of, tensors_of
from tests.trainer.checkpoint import rigs

RANKS, STEPS = 3, 4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with checkpoints of steps 10 and 20, each written by three ranks."""
    path = tmp_path_factory.mktemp("written")
    run, attempt = rigs.begin(path)
    run.run_file.write_text(json.dumps({"run_id": "this-run"}))
    for step in (10, 20):
        assert rigs.save_with_ranks(run, attempt, step, [rigs.OddShapes(seed=step)] * RANKS) == [""] * RANKS
    return run


def assert_all_noticed(found: dict[str, damage.Tally], kind: str, made: int) -> None:
    tally = found[kind]
    assert (tally.made, tally.found, tally.named, tally.previous_used) == (made, made, made, made)


def test_F07_a_file_truncated_to_each_of_20_lengths(written: RunDirectory):
    """F7: each file of a checkpoint, shards, manifest and marker, truncated to each of 20 lengths: found, the file
    named, the checkpoint before it taken."""
    found = damage.tally(written, damage.truncations(written.checkpoint(20, 1)))
    assert_all_noticed(found, "truncated", 20 * (RANKS + 2))


def test_F08_one_bit_flipped_at_200_random_offsets_over_all_files(written: RunDirectory):
    """F8: one bit flipped at 200 random offsets over all files of a checkpoint: 200 of 200 found, the file named, the
    checkpoint before it taken."""
    found = damage.tally(written, damage.flips(written.checkpoint(20, 1), count=200))
    assert_all_noticed(found, "bit flipped", 200)


def test_F09_a_file_missing_or_too_many(written: RunDirectory):
    """F9: a shard, the manifest or the marker missing, and a shard too many: refused with the reason, the checkpoint
    before it taken."""
    newest, before = written.checkpoint(20, 1), written.checkpoint(10, 1)
    found = damage.tally(written, [*damage.absences(newest), *damage.strangers(newest, before)])
    assert_all_noticed(found, "file missing", RANKS + 2)
    assert_all_noticed(found, "file too many", 1)


def test_F10_shards_swapped_between_ranks_or_from_another_step_or_run(written: RunDirectory):
    """F10: two shards swapped between ranks, a shard or the manifest of another step, a checkpoint of another run:
    found by what each file says of itself, the file named, the checkpoint before it taken."""
    newest, before = written.checkpoint(20, 1), written.checkpoint(10, 1)
    found = damage.tally(written, [*damage.swaps(newest), *damage.strangers(newest, before)])
    assert_all_noticed(found, "files swapped", RANKS * (RANKS - 1) // 2)
    assert_all_noticed(found, "file of another step", RANKS + 1)
    with next(damage.swaps(newest)).done(newest):
        said = problems(newest)
        assert f"{rank_file(0)}: is the file of rank 1, step 20" in said[0]
        assert f"{rank_file(1)}: is the file of rank 0, step 20" in said[1]
    *_, manifest, _ = damage.strangers(newest, before)
    with manifest.done(newest):
        assert problems(newest) == [f"{newest.name}: {MANIFEST} is that of step 10, attempt 1"]
    with pytest.raises(CheckpointError, match="belongs to run this-run, not to that-run"):
        read_manifest(newest, run_id="that-run")


def test_F09_symbolic_links_are_never_read_or_deleted_through(written: RunDirectory, tmp_path: Path):
    """F9: a checkpoint, or a file of one, that is a symbolic link out of the run is refused by name when it is read and
    when it is deleted; what it leads to stays as it is."""
    run, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    shutil.copytree(written.path, run.path)
    newest, before = run.checkpoint(20, 1), run.checkpoint(10, 1)
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    assert problems(newest) == [f"{newest.name}: is a symbolic link; a checkpoint lies in its run"]
    for delete in (lambda: retention.discard(newest), lambda: retention.remove(run, newest, attempt=1)):
        with pytest.raises(OSError, match="is a symbolic link: nothing is deleted through it"):
            delete()
    assert problems(elsewhere) == []
    shard = before / rank_file(1)
    shard.rename(tmp_path / "shard")
    shard.symlink_to(tmp_path / "shard")
    assert problems(before) == [f"{before.name}/{rank_file(1)}: is a symbolic link"]
    retention.discard(before)
    assert (tmp_path / "shard").exists()


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "..", "a/b", ""])
def test_F09_a_manifest_that_names_files_elsewhere_is_refused(written: RunDirectory, tmp_path: Path, name: str):
    """F9: a manifest, right by its marker, that names a file outside of its checkpoint is refused unopened."""
    folder = tmp_path / "step-00000020-a1"
    shutil.copytree(written.checkpoint(20, 1), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][1]["file"] = name
    rigs.commit(folder, json.dumps(manifest))
    assert problems(folder) == [f"{folder.name}: {MANIFEST} does not describe a checkpoint of this format"]


def begin_with(path: Path, *steps: int) -> tuple[RunDirectory, Any]:
    run, attempt = rigs.begin(path)
    manager = rigs.manager(run, attempt, keep_last=9)
    for step in steps:
        rigs.saved(manager, step, rigs.FlatEngine(rigs.OddShapes(seed=step)))
    return run, manager


def kept_steps(run: RunDirectory) -> list[int]:
    return [ref.step for ref in valid_checkpoints(run)]


def test_F11_what_a_reader_holds_stays_until_the_next_time(tmp_path: Path):
    """F11: retention while a reader loads: what is held is left alone, the reader finishes, and the next retention
    takes it; the newest K are loadable all the while."""
    run, _ = begin_with(tmp_path, 1, 2, 3)
    with Hold(run.checkpoint(1, 1)):
        assert retain(run, attempt=1, keep_last=1, keep_every_steps=None) == ["step-00000002-a1"]
        expected = rigs.FlatEngine(rigs.OddShapes(seed=1)).snapshot()
        assert rigs.same(rigs.read_back(run.checkpoint(1, 1)), expected)
        assert kept_steps(run) == [1, 3]
    assert retain(run, attempt=1, keep_last=1, keep_every_steps=None) == ["step-00000001-a1"]
    assert kept_steps(run) == [3]
    with pytest.raises(FileNotFoundError):
        Hold(run.checkpoint(1, 1))


def test_F11_reads_without_pause_against_a_retention_without_pause(tmp_path: Path):
    """F11: while checkpoints come and go without pause, every read that has begun ends well, and a read of the newest
    one can always begin."""
    run, manager = begin_with(tmp_path, 1)
    manager.keep_last, saving = 1, threading.Event()

    def save() -> None:
        for step in range(2, 40):
            rigs.saved(manager, step, rigs.FlatEngine(rigs.OddShapes(seed=step)))
        saving.set()

    writer = threading.Thread(target=save)
    writer.start()
    read, late = 0, 0
    while not saving.is_set() or read == 0:
        newest = valid_checkpoints(run)[-1]
        try:
            hold = Hold(newest.path)
        except FileNotFoundError:  # it was replaced by a newer one between the look and the lock
            late += 1
            continue
        with hold:
            assert problems(newest.path) == []
            reader = Reader(newest.path, read_manifest(newest.path))
            assert reader.read("wide").equal(rigs.OddShapes(seed=newest.step).wide)
        read += 1
    writer.join()
    print(f"{read} reads, {late} begun too late")
    assert read > 5
    manager.save(40, rigs.FlatEngine(rigs.OddShapes(seed=40)), {})
    assert manager.wait().state == "done"
    assert kept_steps(run) == [40]


def test_F11_an_older_attempt_cannot_delete_what_a_newer_one_has_accepted(tmp_path: Path):
    """F11: the retention of a cut-off node deletes nothing once a newer attempt has begun, not even what it had chosen
    before."""
    run, _ = begin_with(tmp_path, 1, 2)
    rigs.begin(tmp_path)
    assert retain(run, attempt=1, keep_last=1, keep_every_steps=None) == []
    with pytest.raises(retention.ledger.StaleAttempt):
        retention.remove(run, run.checkpoint(1, 1), attempt=1)
    assert kept_steps(run) == [1, 2]


def retain_once(path: Path) -> None:
    retain(RunDirectory(path), attempt=1, keep_last=2, keep_every_steps=None)


@pytest.mark.gloo
@pytest.mark.slow
def test_F11_sigkill_before_every_call_of_retention(shimmed: Shim, tmp_path: Path):
    """F11: SIGKILL before every single call of a retention that deletes two checkpoints: the newest two are good, what
    half of is left does not count, and the next retention removes it."""
    begin_with(tmp_path / "whole", 1, 2, 3, 4)
    nth, half = 0, 0
    while True:
        nth += 1
        run = RunDirectory(tmp_path / f"run-{nth}")
        shutil.copytree(tmp_path / "whole", run.path)
        rule = shimmed.rule(*CHANGES, path=run.path, nth=nth, kill=True)
        process = ranks.context().Process(target=retain_once, args=(run.path,))
        process.start()
        process.join(120)
        shimmed.clear()
        assert kept_steps(run)[-2:] == [3, 4]
        assert all(problems(ref.path) == [] for ref in valid_checkpoints(run)), nth
        half += any(not (folder / MARKER).exists() for folder in run.checkpoints.iterdir())
        if process.exitcode == 0:
            assert rule.calls == nth - 1
            break
        assert process.exitcode == -9
        retain_once(run.path)
        assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-00000003-a1", "step-00000004-a1"]
    print(f"{nth - 1} calls, {half} states with half a checkpoint")
    assert half > 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of two ranks with checkpoints of steps 2 and 4, and another that went on to step 6 undisturbed."""
    recipe = project(
        tmp_path_factory.mktemp("trained"), train={"max_steps": STEPS + 2},
        optimizer={"schedule": "constant", "warmup_steps": 0}, checkpoint={"rehearse": False, "keep_last": 3},
        cluster={"preflight": False},
    )  # fmt: skip
    assert launch(stored(recipe), force=False, console=Console(io.StringIO())) == 0
    whole = run_of(recipe)
    run = RunDirectory(whole.path.with_name("stopped"))
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.checkpoint(STEPS + 2, 1))
    run.state_file.unlink()
    lines = [line for line in run.ledger_file.read_text().splitlines() if json.loads(line)["kind"] == "start"]
    run.ledger_file.write_text("".join(f"{line}\n" for line in lines))
    return run


def stored(recipe: Path) -> Any:
    from launcher.recipe.check import load

    return load(recipe).recipe


def first_damages(folder: Path, other: Path) -> list[damage.Damage]:
    """One of each kind, in a file of rank 1 where there is a choice."""
    chosen: dict[str, damage.Damage] = {}
    for one in damage.every(folder, other, count=20):
        if one.kind not in chosen or (one.files == (rank_file(1),) and chosen[one.kind].files != one.files):
            chosen[one.kind] = one
    assert list(chosen) == list(damage.KINDS)
    return list(chosen.values())


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(damage.KINDS)), ids=[kind.replace(" ", "-") for kind in damage.KINDS])
def test_F07_to_F10_the_run_names_the_file_before_its_first_step_and_goes_on_exactly(
    trained: RunDirectory, tmp_path: Path, number: int
):
    """F7, F8, F9, F10: a run of two ranks whose newest checkpoint was damaged names the file before its first step,
    goes on from the checkpoint before it, and ends bit-equal with the run that nothing happened to."""
    run = RunDirectory(trained.path.with_name(f"hurt-{number}"))
    shutil.copytree(trained.path, run.path)
    newest = run.checkpoint(STEPS, 1)
    hurt = first_damages(newest, run.checkpoint(STEPS - 2, 1))[number]
    damage.put(newest, hurt.content)
    said = io.StringIO()
    assert launch(stored_recipe(run), force=False, console=Console(said), reason="resume") == 0, said.getvalue()
    before_the_first_step = said.getvalue().partition(f"step {STEPS - 1}/")[0]
    assert f"resumed at step {STEPS - 2} of {STEPS + 2}" in before_the_first_step
    assert any(name in before_the_first_step for name in hurt.files), before_the_first_step
    whole = RunDirectory(trained.path.with_name("tiny"))
    assert losses(run) == losses(whole)
    last = valid_checkpoints(run)[-1]
    assert last.step == STEPS + 2
    assert tensors_of(last.path) == tensors_of(valid_checkpoints(whole)[-1].path)


@pytest.mark.gloo
@pytest.mark.slow
def test_F09_a_run_whose_checkpoints_are_all_bad_stops_and_does_not_begin_anew(trained: RunDirectory):
    """F9: when no checkpoint is whole, the run ends with every reason and the way out; nothing is deleted."""
    run = RunDirectory(trained.path.with_name("all-bad"))
    shutil.copytree(trained.path, run.path)
    for ref in valid_checkpoints(run):
        (ref.path / rank_file(1)).write_bytes(b"")
    said = io.StringIO()
    assert launch(stored_recipe(run), force=False, console=Console(said), reason="resume") == 1
    assert "every checkpoint of this run is bad" in said.getvalue()
    assert f"launcher checkpoint repair {run.path}" in said.getvalue()
    assert "resumed" not in said.getvalue()
    assert kept_steps(run) == [2, STEPS]
