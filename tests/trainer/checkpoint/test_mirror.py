"""The copy of a run in a slower place: what counts there, what comes back, and that it never ends or mixes runs."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.recipe.schema import Checkpoint
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import attempts, end_attempt, valid_checkpoints
from launcher.trainer.checkpoint import mirroring
from launcher.trainer.checkpoint.format import rank_file
from launcher.trainer.checkpoint.mirror import AnotherRun, Mirror, place_of
from launcher.trainer.checkpoint.retention import retain
from launcher.trainer.checkpoint.store import Store, StoreError
from launcher.trainer.checkpoint.verify import MANIFEST, problems
from tests.trainer.checkpoint import rigs


@pytest.fixture(params=["path", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and fsspec's store in memory, which knows neither folders nor durability, as object stores do."""
    if request.param == "path":
        return str(tmp_path / "mirror")
    return f"memory://{tmp_path.name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL_S", 0.01), ("FIRST_RETRY_S", 0.01), ("_LAST_RETRY_S", 0.01)):
        monkeypatch.setattr(mirroring, name, seconds)


def begin(tmp_path: Path, run_id: str = "this-run") -> tuple[RunDirectory, int]:
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps({"run_id": run_id}))
    (path / "recipe.yaml").write_text("{}\n")
    return rigs.begin(path)


def train(run: RunDirectory, attempt: int, *steps: int, keep_last: int = 2) -> None:
    manager = rigs.manager(run, attempt, keep_last=keep_last)
    for step in steps:
        rigs.saved(manager, step, rigs.FlatEngine(rigs.OddShapes(seed=step)))


def mirrored(
    tmp_path: Path, place: str, *steps: int, said: list[str] | None = None, keep_last: int = 2
) -> RunDirectory:
    """A run with these checkpoints, copied to the place."""
    run, attempt = begin(tmp_path)
    with mirroring.mirrored(run, Checkpoint(mirror=place, keep_last=keep_last), (said or []).append):
        train(run, attempt, *steps, keep_last=keep_last)
    return run


def mirror_of(run: RunDirectory, place: str) -> Mirror:
    return Mirror(run, place_of(place, run.name))


def names(refs: object) -> list[str]:
    return [ref.path.name for ref in refs]  # type: ignore[attr-defined]


def test_the_place_of_a_run_is_below_the_mirror_or_where_run_stands():
    assert place_of("/mirror/", "one") == "/mirror/one"
    assert place_of("s3://bucket/{run}/copies", "one") == "s3://bucket/one/copies"


def test_what_is_committed_is_there_whole_at_the_end_and_kept_by_the_same_keys(tmp_path, place):
    said: list[str] = []
    run, attempt = begin(tmp_path)
    with mirroring.mirrored(run, Checkpoint(mirror=place, keep_last=2), said.append):
        train(run, attempt, 1, 2, 3)
        end_attempt(run, attempt, step=3, outcome_class="finished")
    copy = mirror_of(run, place)
    assert names(copy.complete()) == ["step-00000002-a1", "step-00000003-a1"]
    assert said == [f"mirror: step-00000003-a1 and the run's records are in {copy.place}"]
    assert copy._store.read("ledger.jsonl") == run.ledger_file.read_bytes(), "the end of the run is there, too"
    folders = {name.partition("/")[0] for name in copy._store.sizes("checkpoints")}
    assert folders == {"step-00000002-a1", "step-00000003-a1"}


def test_a_run_whose_directory_is_gone_comes_back_and_goes_on_from_its_newest(tmp_path, place):
    run, said = mirrored(tmp_path, place, 1, 2, 3), []
    shutil.rmtree(run.path)
    mirroring.restore(run, Checkpoint(mirror=place), said.append)
    assert said == [
        f"mirror: {run.path} was not here and is restored from {place}/one",
        f"mirror: restored step-00000003-a1 (1 files, verified) from {place}/one",
    ]
    assert problems(run.checkpoint(3, 1), run_id="this-run") == []
    _, attempt = rigs.begin(run.path)
    assert attempts(run)[-1].accepts == ("step-00000003-a1",)
    engine = rigs.FlatEngine(rigs.OddShapes())
    assert rigs.manager(run, attempt).load_latest(engine) == {"step": 3}
    assert rigs.same(engine.snapshot(), rigs.FlatEngine(rigs.OddShapes(seed=3)).snapshot())


def test_checkpoints_that_are_gone_come_back_and_those_that_are_here_stay(tmp_path, place):
    run, said = mirrored(tmp_path, place, 1, 2, 3), []
    mirroring.restore(run, Checkpoint(mirror=place), said.append)
    assert said == []
    shutil.rmtree(run.checkpoint(3, 1))
    mirroring.restore(run, Checkpoint(mirror=place), said.append)
    newest = names(valid_checkpoints(run))[-2:]  # an older one stays where it was being copied when it was to go
    assert newest == ["step-00000002-a1", "step-00000003-a1"]
    (run.checkpoint(3, 1) / MARKER).unlink()
    mirroring.restore(run, Checkpoint(mirror=place), said.append)
    assert problems(run.checkpoint(3, 1)) == []
    assert (run.checkpoints / "bad" / "step-00000003-a1").is_dir(), "what lay there uncommitted is put aside"


@pytest.mark.parametrize("name", [rank_file(0), MANIFEST, MARKER])
def test_a_half_upload_never_counts(tmp_path, place, name):
    """The files of step 3 are there but for one, as an upload that was cut short leaves them."""
    run = mirrored(tmp_path, place, 2, 3)
    copy = mirror_of(run, place)
    copy._store.remove(f"checkpoints/step-00000003-a1/{MARKER}")
    if name != MARKER:
        copy._store.remove(f"checkpoints/step-00000003-a1/{name}")
    shutil.rmtree(run.path)
    mirroring.restore(run, Checkpoint(mirror=place), print)
    assert names(valid_checkpoints(run)) == ["step-00000002-a1"]


def test_a_bad_copy_is_named_and_the_one_before_is_fetched(tmp_path, place):
    run, said = mirrored(tmp_path, place, 2, 3), []
    store = mirror_of(run, place)._store
    file = f"checkpoints/step-00000003-a1/{rank_file(0)}"
    content = bytearray(store.read(file) or b"")
    content[-9] ^= 1
    store.write(file, bytes(content))
    shutil.rmtree(run.path)
    mirroring.restore(run, Checkpoint(mirror=place), said.append)
    assert f"warning: mirror: bad checkpoint: {place}/one/{file}: its content is not what the manifest says" in said
    assert names(valid_checkpoints(run)) == ["step-00000002-a1"]


def test_a_bad_checkpoint_is_not_copied(tmp_path, place):
    run, attempt = begin(tmp_path)
    train(run, attempt, 2, 3)
    path = run.checkpoint(3, 1) / rank_file(0)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    with mirroring.mirrored(run, Checkpoint(mirror=place), said.append):
        pass
    assert "warning: mirror: a bad checkpoint is not copied: step-00000003-a1/rank-00000.safetensors: " in said[0]
    assert names(mirror_of(run, place).complete()) == ["step-00000002-a1"]


@pytest.mark.parametrize("name", [rank_file(0), MANIFEST, MARKER])
def test_a_rank_replaces_a_bad_file_from_the_mirror_and_loads_the_newest(tmp_path, place, name, capsys):
    run = mirrored(tmp_path, place, 2, 3)
    path = run.checkpoint(3, 1) / name
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    _, attempt = rigs.begin(run.path)
    engine = rigs.FlatEngine(rigs.OddShapes())
    loader = rigs.manager(run, attempt, mirror=lambda: mirror_of(run, place))
    assert loader.load_latest(engine) == {"step": 3}
    assert loader.problems == []
    assert "was bad and is replaced by its copy in" in capsys.readouterr().out
    assert problems(run.checkpoint(3, 1)) == []
    assert (run.checkpoints / "bad" / "step-00000003-a1" / name).exists()


def test_a_mirror_of_another_run_is_refused_both_ways(tmp_path, place):
    mirrored(tmp_path, place, 1)
    shutil.rmtree(tmp_path / "runs")
    run, attempt = begin(tmp_path, run_id="another-run")
    with pytest.raises(UserError, match=r"holds another run \(id this-run, this one is another-run\)"):
        mirroring.restore(run, Checkpoint(mirror=place), print)
    said: list[str] = []
    with mirroring.mirrored(run, Checkpoint(mirror=place), said.append):
        manager = rigs.manager(run, attempt)
        manager.meta["run_id"] = "another-run"
        rigs.saved(manager, 7, rigs.FlatEngine(rigs.OddShapes()))
    assert "holds another run" in said[0]
    assert "step-00000007-a1" not in str(mirror_of(run, place)._store.sizes("checkpoints"))


def test_two_places_that_go_on_with_one_run_are_told_apart(tmp_path, place):
    """A cut-off place whose run was restored elsewhere copies nothing more, and takes over what was done there."""
    run = mirrored(tmp_path, place, 1)
    cut_off = tmp_path / "cut-off" / "one"
    shutil.copytree(run.path, cut_off)
    shutil.rmtree(run.path)
    mirroring.restore(run, Checkpoint(mirror=place), print)
    _, attempt = rigs.begin(run.path)
    with mirroring.mirrored(run, Checkpoint(mirror=place), print):
        train(run, attempt, 4)
    late, said = RunDirectory(cut_off), []
    with mirroring.mirrored(late, Checkpoint(mirror=place), said.append):
        train(late, 1, 3)
    assert "this run has gone on elsewhere" in said[0]
    assert names(mirror_of(run, place).complete()) == ["step-00000001-a1", "step-00000004-a2"]
    mirroring.restore(late, Checkpoint(mirror=place), said.append)
    assert f"mirror: {cut_off} had gone on elsewhere, which is taken over from {place}/one" in said
    assert names(valid_checkpoints(late)) == ["step-00000001-a1", "step-00000004-a2"], "step 3 is void"
    rigs.begin(run.path)
    rigs.begin(late.path)
    with mirroring.mirrored(late, Checkpoint(mirror=place), print):
        pass
    with pytest.raises(UserError, match="have gone separate ways"):
        mirroring.restore(run, Checkpoint(mirror=place), print)


def test_a_mirror_that_fails_is_said_once_and_tried_again(tmp_path, monkeypatch):
    """A real path that cannot be written, because a file lies in its way."""
    run, attempt = begin(tmp_path)
    place, said = tmp_path / "mirror", []
    place.write_text("in the way")
    failed = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        failed.set()

    with mirroring.mirrored(run, Checkpoint(mirror=str(place)), say):
        train(run, attempt, 1, 2)
        assert failed.wait(60)
        place.unlink()
    assert said[0].startswith(f"warning: mirror: {place}/one: ")
    assert said[0].endswith("Training goes on and it is tried again.")
    assert said[1:] == [
        "mirror: it works again",
        f"mirror: step-00000002-a1 and the run's records are in {place}/one",
    ]


def test_a_mirror_that_is_not_complete_at_the_end_is_said_with_the_reason(tmp_path):
    run, attempt = begin(tmp_path)
    place, said = tmp_path / "mirror", []
    place.write_text("in the way")
    with mirroring.mirrored(run, Checkpoint(mirror=str(place)), said.append):
        train(run, attempt, 1)
    assert said[-1].startswith(f"warning: mirror: {place}/one is not complete: ")


def test_without_the_mirror_a_run_goes_on_only_where_it_has_what_it_needs(tmp_path):
    run, attempt = begin(tmp_path)
    train(run, attempt, 1)
    place, said = tmp_path / "mirror", []
    place.write_text("in the way")
    keys = Checkpoint(mirror=str(place))
    mirroring.restore(run, keys, said.append)
    assert said[0].startswith("warning: mirror: ")
    end_attempt(run, attempt, step=1, outcome_class="unknown")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="cannot go on where it was"):
        mirroring.restore(run, keys, said.append)
    shutil.rmtree(run.path)
    with pytest.raises(UserError, match=r"checkpoint\.mirror=null"):
        mirroring.restore(run, keys, said.append)


def test_a_checkpoint_that_is_being_copied_is_not_deleted(tmp_path, monkeypatch):
    """The copy stands still in the middle of a file while retention runs; then it ends well."""
    run, attempt = begin(tmp_path)
    train(run, attempt, 1)
    begun, go_on, copy = threading.Event(), threading.Event(), Store._copy

    def slow(self: Store, source: object, target: object) -> tuple[int, str]:
        begun.set()
        assert go_on.wait(60)
        return copy(self, source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_copy", slow)
    with mirroring.mirrored(run, Checkpoint(mirror=str(tmp_path / "mirror"), keep_last=1), print):
        assert begun.wait(60)
        train(run, attempt, 2, keep_last=1)
        assert names(valid_checkpoints(run)) == ["step-00000001-a1", "step-00000002-a1"]
        go_on.set()
    assert names(mirror_of(run, str(tmp_path / "mirror")).complete()) == ["step-00000002-a1"]
    retain(run, attempt=attempt, keep_last=1, keep_every_steps=None)
    assert names(valid_checkpoints(run)) == ["step-00000002-a1"]


def test_a_bucket_that_is_not_there_is_the_stores_fault(tmp_path, monkeypatch):
    """s3fs says FileNotFoundError of a bucket that is missing; the file here is whole."""
    store = Store(f"memory://{tmp_path.name}")
    file = tmp_path / "file"
    file.write_bytes(b"abc")

    def no_bucket(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(store._system, "open", no_bucket)
    with pytest.raises(StoreError, match="bucket does not exist"):
        store.put(file, "file", num_bytes=3, xxh3_128="")


def test_what_is_no_run_there_is_refused(tmp_path, place):
    run, _ = begin(tmp_path)
    mirror = mirror_of(run, place)
    mirror._store.write("run.json", b"[]")
    with pytest.raises(AnotherRun, match=r"its run\.json is none"):
        mirror.run_id()
