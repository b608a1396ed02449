"""How a save ends: committed when every rank succeeded, gone when one did not; full disks, silent peers, fencing."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.run import ledger
from launcher.trainer.checkpoint import saving
from launcher.trainer.checkpoint.format import rank_file
from launcher.trainer.checkpoint.reader import MANIFEST, MARKER
from tests.trainer.checkpoint import rigs

DISK = 1 << 20  # bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(path: Path) -> None:
    """Take every byte that is left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert free_bytes(path.parent) == 0


def engine_of(num_bytes: int) -> rigs.FlatEngine:
    """An engine whose checkpoint takes about that much: value and two moments."""
    module = torch.nn.Linear(num_bytes // 12, 1, bias=False)
    return rigs.FlatEngine(module)


def test_a_committed_folder_holds_shards_manifest_and_marker_and_nothing_else(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    assert rigs.save_with_ranks(run, attempt, 7, [rigs.OddShapes()] * 3) == ["", "", ""]
    assert names(run.checkpoint(7, attempt)) == [MARKER, MANIFEST, rank_file(0), rank_file(1), rank_file(2)]
    assert run.checkpoint(7, attempt).name == "step-00000007-a1"


def test_L7_all_else_is_durable_before_the_marker_appears(tmp_path, monkeypatch):
    """What a power cut could take away: each name and each content is fsynced, and the marker after all of them."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(("appears", Path(target).name))
        replace(source, target)

    run, attempt = rigs.begin(tmp_path)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    assert rigs.save_with_ranks(run, attempt, 7, [rigs.OddShapes()] * 2) == ["", ""]
    folder, marker = run.checkpoint(7, attempt).name, events.index(("appears", MARKER))
    manifest = events.index(("appears", MANIFEST))
    for rank in range(2):
        assert events.index(("fsync", rank_file(rank))) < manifest
    assert events[manifest - 1][0] == "fsync"
    assert events[manifest - 1][1].startswith(f".{MANIFEST}")
    assert ("fsync", folder) in events[manifest:marker]
    assert ("fsync", run.checkpoints.name) in events[manifest:marker]
    assert events[marker - 1][1].startswith(f".{MARKER}")
    assert ("fsync", folder) in events[marker:]


def test_L7_marker_is_absent_and_the_folder_gone_when_one_rank_fails_to_write(tmp_path, monkeypatch):
    write_file = saving.write_file

    def fails_on_rank_2(path, snapshot, **more):
        if path.name == rank_file(2):
            path.write_bytes(b"half of it")
            raise OSError(30, "Read-only file system")
        return write_file(path, snapshot, **more)

    monkeypatch.setattr(saving, "write_file", fails_on_rank_2)
    run, attempt = rigs.begin(tmp_path)
    reasons = rigs.save_with_ranks(run, attempt, 7, [rigs.OddShapes()] * 3)
    told = f"rank 2: {rank_file(2)}: Read-only file system"
    assert reasons == [told, "another rank failed; rank 0 has the reason", told]
    assert names(run.checkpoints) == []
    assert ledger.valid_checkpoints(run) == []


def test_L7_a_full_disk_fails_one_save_and_the_next_succeeds_once_there_is_room(small_disk):
    run, attempt = rigs.begin(small_disk)
    manager, engine = rigs.manager(run, attempt), engine_of(DISK // 4)
    rigs.saved(manager, 1, engine)
    before = free_bytes(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (before - DISK // 8))

    manager.save(2, engine, {"step": 2})
    status = manager.wait()
    assert (status.state, status.step) == ("failed", 2)
    size = (folder := run.checkpoint(1, attempt) / rank_file(0)).stat().st_size
    assert status.needs == size, folder
    said = f"rank 0: {rank_file(0)}: No space left on device (the checkpoint needs {size / 1024:.1f} KiB, "
    assert status.reason.startswith(said)
    assert status.reason.endswith(" KiB are free)")
    assert [ref.step for ref in ledger.valid_checkpoints(run)] == [1]
    assert names(run.checkpoints) == ["step-00000001-a1"]
    assert free_bytes(small_disk) >= DISK // 8 - 8192, "what the failed save had written was not freed"

    ballast.unlink()
    rigs.saved(manager, 2, engine)
    assert [ref.step for ref in ledger.valid_checkpoints(run)] == [1, 2]
    assert manager.poll().state == "idle"


def test_L7_a_disk_that_is_full_for_one_rank_only_fails_the_save_on_all(small_disk):
    """Ranks 0 and 2 fit, rank 1 does not; nobody waits for ever, and the space comes back."""
    run, attempt = rigs.begin(small_disk)
    module = torch.nn.Linear(3 * DISK // 12, 1, bias=False)  # 1 MiB for each of three ranks
    reasons = rigs.save_with_ranks(run, attempt, 1, [module] * 3)
    assert any("No space left on device" in reason for reason in reasons)
    assert all(reasons)
    assert "No space left on device" in reasons[0], "rank 0 must know the reason"
    assert names(run.checkpoints) == []
    small = torch.nn.Linear(100, 1)
    assert rigs.save_with_ranks(run, attempt, 1, [small] * 3) == ["", "", ""]


def test_L7_a_disk_without_a_free_byte_fails_the_save_and_not_the_run(small_disk):
    run, attempt = rigs.begin(small_disk)
    fill(small_disk / "ballast")
    manager, engine = rigs.manager(run, attempt), engine_of(1000)
    manager.save(1, engine, {})
    assert "No space left on device" in str(manager.wait().reason)
    reasons = rigs.save_with_ranks(run, attempt, 1, [torch.nn.Linear(9, 9)] * 3)
    assert "No space left on device; rank 1: the disk is full; rank 2: the disk is full (the che" in reasons[0]
    assert names(run.checkpoints) == []
    (small_disk / "ballast").unlink()
    rigs.saved(manager, 1, engine)


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
from launcher.run import ledger
from tests.trainer.checkpoint import rigs
run, attempt = rigs.begin(Path(sys.argv[1]))
manager = rigs.manager(run, attempt)
rigs.saved(manager, 1, rigs.FlatEngine(torch.nn.Linear(100, 1)))
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
manager.save(2, rigs.FlatEngine(torch.nn.Linear(10000, 1)), {})
print(manager.wait().reason)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print([ref.step for ref in ledger.valid_checkpoints(run)], sorted(p.name for p in run.checkpoints.iterdir()))
"""


def test_L7_a_file_larger_than_the_quota_fails_the_save_and_not_the_run(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", _LIMITED, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"rank 0: {rank_file(0)}: File too large", "[1] ['step-00000001-a1']"]


def test_a_silent_peer_is_named_and_the_save_given_up(tmp_path, monkeypatch):
    write_own = saving._write_own
    monkeypatch.setattr(
        saving, "_write_own", lambda save: write_own(save) if save.rank != 1 else (0, saving._Failure("died", False, 0))
    )
    run, attempt = rigs.begin(tmp_path)
    reasons = rigs.save_with_ranks(run, attempt, 1, [rigs.OddShapes()] * 3, patience_s=0.2)
    assert reasons[0] == "no word from ranks [1] within 0.2 s"
    assert names(run.checkpoints) == []


def test_L11_a_save_that_ends_after_a_newer_attempt_began_leaves_no_checkpoint(tmp_path, monkeypatch):
    run, attempt = rigs.begin(tmp_path)
    commit = saving._commit

    def a_new_attempt_begins_first(save, verdicts):
        rigs.begin(tmp_path)
        commit(save, verdicts)

    monkeypatch.setattr(saving, "_commit", a_new_attempt_begins_first)
    reasons = rigs.save_with_ranks(run, attempt, 1, [rigs.OddShapes()] * 2)
    assert "attempt 1 is over, attempt 2 has started" in reasons[0]
    assert names(run.checkpoints) == []
    manager = rigs.manager(run, attempt)
    manager.save(2, rigs.FlatEngine(rigs.OddShapes()), {})
    assert "attempt 1 is over" in str(manager.wait().reason)
    assert names(run.checkpoints) == []


def test_pieces_that_do_not_make_up_the_model_are_never_committed(tmp_path):
    class Forgetful(rigs.FlatEngine):
        def pieces(self):
            return (piece for piece in super().pieces() if (piece.name, piece.kind) != ("cube", "exp_avg"))

    run, attempt = rigs.begin(tmp_path)
    manager = rigs.manager(run, attempt)
    manager.save(1, Forgetful(rigs.OddShapes()), {})
    assert "the engine's pieces do not make up the model" in str(manager.wait().reason)
    assert names(run.checkpoints) == []


def test_what_an_unfinished_save_of_the_same_name_left_is_replaced(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    left = run.checkpoint(3, attempt)
    left.mkdir(parents=True)
    (left / rank_file(0)).write_bytes(b"half")
    (left / rank_file(9)).write_bytes(b"of a larger job")
    rigs.saved(rigs.manager(run, attempt), 3, rigs.FlatEngine(rigs.OddShapes()))
    assert names(left) == [MARKER, MANIFEST, rank_file(0)]


def test_saving_a_committed_step_again_does_nothing(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    manager, engine = rigs.manager(run, attempt), rigs.FlatEngine(rigs.OddShapes())
    folder = rigs.saved(manager, 3, engine)
    before = (folder / MANIFEST).stat().st_mtime_ns
    assert rigs.saved(manager, 3, engine) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == before


def test_asynchronous_saves_hold_the_state_of_their_own_step(tmp_path):
    """The next save waits for the one in flight, because there is one buffer; training changes the state at once."""
    run, attempt = rigs.begin(tmp_path)
    manager, engine = rigs.manager(run, attempt, keep_last=9), rigs.FlatEngine(rigs.OddShapes())
    states = {}
    for step in range(1, 7):
        engine.disturb(step)
        states[step] = engine.snapshot()
        manager.save(step, engine, {"step": step})
        engine.disturb(100 + step)
    assert manager.wait().step == 6
    assert [manager.poll().step for _ in range(6)] == [1, 2, 3, 4, 5, None]
    for step, state in states.items():
        assert rigs.same(rigs.read_back(run.checkpoint(step, attempt)), state)


def test_a_synchronous_save_needs_no_host_buffer_and_writes_the_same(tmp_path):
    run, attempt = rigs.begin(tmp_path)
    engine = rigs.FlatEngine(rigs.OddShapes())
    engine.disturb(4)
    manager = rigs.manager(run, attempt, asynchronous=False)
    manager.save(1, engine, {})
    status = manager.poll()
    assert (status.state, manager._buffer) == ("done", None)
    assert status.blocked_s > 0
    assert rigs.same(rigs.read_back(run.checkpoint(1, attempt)), engine.snapshot())
