"""Damage to the newest checkpoint of a run: whether the loader finds it, names the file and takes the one before."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLIPS, LENGTHS = 200, 20


@dataclass(frozen=True, slots=True)
class Damage:
    """A change of a checkpoint folder.

    file: whose name must be said; empty where a folder without its marker is no checkpoint at all
    """

    what: str
    file: str
    do: Callable[[Path], None]


def damages(run: Any, chance: random.Random) -> dict[str, list[Damage]]:
    """All that is tried on the newest checkpoint of a run, by kind."""
    from launcher.run.directory import MARKER
    from launcher.run.ledger import valid_checkpoints
    from launcher.trainer.checkpoint.format import rank_file

    before, newest = (ref.path for ref in valid_checkpoints(run)[-2:])
    kept = before.parent.parent / "pristine"
    if not kept.exists():
        shutil.copytree(newest, kept / newest.name)
        shutil.copytree(before, kept / before.name)
    older = kept / before.name
    files = sorted(path.name for path in (kept / newest.name).iterdir() if path.is_file())
    sizes = {name: (kept / newest.name / name).stat().st_size for name in files}
    flips = []
    for number in range(FLIPS):  # each file as often as any other
        name = files[number % len(files)]
        at, bit = chance.randrange(sizes[name]), chance.randrange(8)
        flips.append(Damage(f"bit {bit} of byte {at} of {name}", name, _flip(name, at, bit)))
    cuts = [
        Damage(f"{name} cut to {i * sizes[name] // LENGTHS} bytes", name, _cut(name, i * sizes[name] // LENGTHS))
        for name in files
        for i in range(LENGTHS)
    ]
    one, two = rank_file(0), rank_file(1)
    swaps = [
        Damage("shards of two ranks swapped", one, _swap(one, two)),
        *(Damage(f"{name} of the step before", name, _copy(older / name, name)) for name in files if name != MARKER),
    ]
    missing = [Damage(f"{name} missing", "" if name == MARKER else name, _remove(name)) for name in files]
    foreign = [
        Damage("a shard too many", rank_file(7), _copy(older / one, rank_file(7))),
        Damage("a shard of another step in place of one", two, _copy(older / two, two)),
        Damage("a shard of another rank in place of one", two, _copy(kept / newest.name / one, two)),
    ]
    return {
        f"one bit flipped, {len(files)} files": flips, "truncated": cuts, "swapped": swaps, "missing": missing,
        "foreign": foreign,
    }  # fmt: skip


def _flip(name: str, at: int, bit: int) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1 << bit
        (folder / name).write_bytes(content)

    return do


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def _swap(one: str, two: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / one).rename(folder / "aside")
        (folder / two).rename(folder / one)
        (folder / "aside").rename(folder / two)

    return do


def _copy(source: Path, name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(source, folder / name) and None


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


class Memory:
    """An engine without process group: the tensors that a manifest names, all on this rank."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        import torch

        self.params = manifest["params"]
        self.tensors = {
            (name, kind): torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in self.params.items()
            for kind in manifest["kinds"]
            if kind == "value" or entry["trainable"]
        }

    def ensure_state(self) -> None:
        """There from the beginning."""

    def pieces(self) -> Iterator[Any]:
        from launcher.trainer.checkpoint.format import Piece

        for (name, kind), tensor in self.tensors.items():
            yield Piece(name, kind, 0, tensor.view(-1))

    def set_step(self, step: int) -> None:
        self.step = step

    def refresh(self) -> None:
        """Nothing to make anew."""

    def parameter_shapes(self) -> dict[str, dict[str, Any]]:
        return dict(self.params)


def load_damaged(run: Any, tries: list[Damage]) -> list[str]:
    """Load after each damage, in this process; sentences on what was not found, not named or loaded wrongly."""
    import torch

    from launcher.run import ledger
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.checkpoint.reader import Reader
    from launcher.trainer.checkpoint.verify import read_manifest

    attempt = ledger.start_attempt(run, target="local", job_id="flips", nodes=["here"], reason="benchmark")
    before, newest = (ref.path for ref in ledger.valid_checkpoints(run)[-2:])
    kept, meta, wrong = run.path / "pristine", {"run_id": run.read_json("run.json")["run_id"]}, []
    manifest = read_manifest(before)
    reader = Reader(before, manifest)
    good = {key: reader.read(*key) for key in Memory(manifest).tensors}
    for damage in tries:
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(kept / newest.name, newest)
        damage.do(newest)
        engine = Memory(manifest)
        manager = CheckpointManager(run, attempt=attempt, rank=0, world_size=1, meta=meta)
        with contextlib.redirect_stdout(io.StringIO()):  # what a rank's log would say
            manager.load_latest(engine)
        said = "\n".join(manager.problems)
        if manager.loaded != before.name:
            wrong.append(f"{damage.what}: loaded {manager.loaded}")
        elif damage.file and (newest.name not in said or damage.file not in said):
            wrong.append(f"{damage.what}: {damage.file} is not named in: {said}")
        elif any(not torch.equal(engine.tensors[key], tensor) for key, tensor in good.items()):
            wrong.append(f"{damage.what}: another state than that of {before.name}")
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(kept / newest.name, newest)
    return wrong


def resume_damaged(ground: Any, scene: Any, run: Any, damage: Damage) -> list[str]:
    """Go on with a copy of the run as a person would; what is wrong with how it ends."""
    from launcher.run.ledger import latest_attempt, valid_checkpoints

    whole = run.path.with_name("as-it-was")
    shutil.copytree(run.path, whole)
    try:
        before, newest = (ref.path for ref in valid_checkpoints(run)[-2:])
        damage.do(newest)
        code, said = ground.lane.finish(ground.recipe, f"run.name={run.name}", *scene.changes)
        logs = "".join(path.read_text() for path in run.path.glob(f"logs/attempt-{latest_attempt(run)}/*/0.log"))
        begins = int(before.name.split("-")[1])
        wrong = [] if code == 0 else [f"{damage.what}: ended with {code}: {said[-800:]}"]
        if damage.file and damage.file not in logs:
            wrong.append(f"{damage.what}: {damage.file} is not named in the log")
        if f"step {begins} of" not in logs:
            wrong.append(f"{damage.what}: did not begin at step {begins}: {logs[:800]}")
        differences = ground.differences(run.name, scene, damaged=True)
        return wrong + [f"{damage.what}: {difference}" for difference in differences]
    finally:
        shutil.rmtree(run.path)
        whole.rename(run.path)
