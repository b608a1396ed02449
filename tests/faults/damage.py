"""What can happen to the files of a checkpoint that lies on disk, done for real and taken back; and how it is noticed.

Used by the tests of F7 to F10 and by the benchmark's table of damages.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.run.directory import MARKER, RunDirectory
from launcher.trainer.checkpoint.care import entries, resumes_from
from launcher.trainer.checkpoint.verify import MANIFEST

KINDS = ("bit flipped", "truncated", "file missing", "files swapped", "file of another step", "file too many")


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage of a checkpoint.

    files: those that must be named, one of them at least
    content: what is then in each file that is touched, by name; None: it is not there
    """

    kind: str
    files: tuple[str, ...]
    content: dict[str, bytes | None]

    @contextlib.contextmanager
    def done(self, folder: Path) -> Iterator[None]:
        """While this is open, the folder is damaged."""
        before = {name: read(folder / name) for name in self.content}
        put(folder, self.content)
        try:
            yield
        finally:
            put(folder, before)


@dataclass(slots=True)
class Tally:
    """How many damages of a kind were made, found, found by the file's name, and answered by the checkpoint before."""

    made: int = 0
    found: int = 0
    named: int = 0
    previous_used: int = 0


def flips(folder: Path, *, count: int = 200, seed: int = 7) -> Iterator[Damage]:
    """One bit each, at random offsets over all files, each file as often as any other."""
    chance, files = random.Random(seed), sorted(folder.iterdir())
    for i in range(count):
        path = files[i % len(files)]
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield Damage(KINDS[0], (path.name,), {path.name: bytes(content)})


def truncations(folder: Path, *, lengths: int = 20) -> Iterator[Damage]:
    """Each file cut to so many lengths, from nothing to nearly all of it."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for i in range(lengths):
            yield Damage(KINDS[1], (path.name,), {path.name: content[: i * len(content) // lengths]})


def absences(folder: Path) -> Iterator[Damage]:
    """Each file gone: every shard, the manifest, the marker."""
    for path in sorted(folder.iterdir()):
        yield Damage(KINDS[2], (path.name,), {path.name: None})


def swaps(folder: Path) -> Iterator[Damage]:
    """The shards of each two ranks in each other's place."""
    shards = sorted(folder.glob("rank-*.safetensors"))
    for i, one in enumerate(shards):
        for other in shards[i + 1 :]:
            content: dict[str, bytes | None] = {one.name: other.read_bytes(), other.name: one.read_bytes()}
            yield Damage(KINDS[3], (one.name, other.name), content)


def strangers(folder: Path, other: Path) -> Iterator[Damage]:
    """Files of another step in the place of this one's, and beside them."""
    shards = sorted(folder.glob("rank-*.safetensors"))
    for path in shards:
        yield Damage(KINDS[4], (path.name,), {path.name: (other / path.name).read_bytes()})
    both: dict[str, bytes | None] = {name: (other / name).read_bytes() for name in (MANIFEST, MARKER)}
    yield Damage(KINDS[4], (MANIFEST,), both)
    extra = f"rank-{len(shards):05d}.safetensors"
    yield Damage(KINDS[5], (extra,), {extra: (other / shards[0].name).read_bytes()})


def every(folder: Path, other: Path, *, count: int = 200) -> Iterator[Damage]:
    """All of the above."""
    yield from flips(folder, count=count)
    yield from truncations(folder)
    yield from absences(folder)
    yield from swaps(folder)
    yield from strangers(folder, other)


def tally(run: RunDirectory, damages: Iterable[Damage]) -> dict[str, Tally]:
    """Do each to the newest checkpoint of a run with two, and look at what the next start would do, every byte read.

    Returns:
        By kind.
    """
    good = entries(run, verify=True)
    assert [entry.state for entry in good[-2:]] == ["good", "good"], good
    previous, newest = (run.checkpoints / entry.name for entry in good[-2:])
    found = {kind: Tally() for kind in KINDS}
    for damage in damages:
        with damage.done(newest):
            seen = entries(run, verify=True)
        noticed, entry = found[damage.kind], next(entry for entry in seen if entry.name == newest.name)
        noticed.made += 1
        noticed.found += entry.state in ("bad", "unfinished")
        noticed.named += any(name in problem for problem in entry.problems for name in damage.files)
        noticed.previous_used += resumes_from(seen) == previous.name
    return found


def read(path: Path) -> bytes | None:
    """What is in a file; None: it is not there."""
    return path.read_bytes() if path.exists() else None


def put(folder: Path, content: dict[str, bytes | None]) -> None:
    """Write these files, or take them away."""
    for name, data in content.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(data)
