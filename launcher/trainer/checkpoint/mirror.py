"""The copy of a run in a slower, durable place (`checkpoint.mirror`): what lies there, and when it counts. No torch.

It has the layout of a run directory. A checkpoint's files go up first, then its manifest, then the run's own records
(recipe, plan, data, ledger, identity), its marker last; so a half upload never counts, and what counts can go on.
Whose copy it is, the run id says; that no later start elsewhere owns it, the ledger: there only the ledger from here,
or a beginning of it, may lie. When to copy is up to `mirroring.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory, checkpoint_name, parse_checkpoint_name
from launcher.run.files import sync_folder, write_atomic
from launcher.run.ledger import CheckpointRef
from launcher.trainer.checkpoint.retention import Hold, kept
from launcher.trainer.checkpoint.store import Store
from launcher.trainer.checkpoint.verify import (
    MANIFEST,
    THREADS,
    CheckpointError,
    Manifest,
    all_files,
    marker_text,
    read_manifest,
    read_table,
)

CHECKPOINTS = "checkpoints"
BAD = "bad"  # folder below checkpoints/ for what was found bad
RECORDS = (
    "recipe.yaml", "plan.json", "data.json", "contents.json", "rehearsal.json", "left-out.jsonl", "ledger.jsonl",
)  # what a resume needs; run.json comes last  # fmt: skip


class AnotherRun(Exception):
    """The place holds another run, or this run as it went on elsewhere; the text says what to do."""


def place_of(mirror: str, run_name: str) -> str:
    """Where the copy of a run lies: `{run}` is its name, which comes last where it is not given."""
    if "{run}" in mirror:
        return mirror.replace("{run}", run_name)
    return f"{mirror.rstrip('/')}/{run_name}"


class Mirror:
    """A run's copy.

    Args:
        place: absolute path or URL of this run's folder there, as `place_of` gives it
        ended: asked while files are copied; true: give up
    Raises:
        UserError: the place cannot be opened here.
    """

    def __init__(self, run: RunDirectory, place: str, *, ended: Callable[[], bool] = lambda: False) -> None:
        self.run, self.place = run, place
        self._store = Store(place, ended=ended)
        self._sent: dict[str, bytes] = {}  # records as they are there
        self._complete: set[str] | None = None

    def run_id(self) -> str | None:
        """Which run lies there; None: none.

        Raises:
            StoreError: it cannot be reached; AnotherRun: what lies there is no run.
        """
        text = self._store.read("run.json")
        if text is None:
            return None
        try:
            return str(json.loads(text)["run_id"])
        except (ValueError, KeyError, TypeError):
            raise AnotherRun(f"{self.place}: its run.json is none. Choose another checkpoint.mirror.") from None

    def complete(self) -> list[CheckpointRef]:
        """Whole checkpoints there that count by this run's ledger, ascending by (step, attempt)."""
        found = self._store.sizes(CHECKPOINTS)
        return ledger.counting(self.run, [name[: -len(MARKER) - 1] for name in found if name.endswith(f"/{MARKER}")])

    def has(self, name: str) -> bool:
        """Whether a checkpoint lies there whole; asked once, then remembered."""
        if self._complete is None:
            self._complete = {ref.path.name for ref in self.complete()}
        return name in self._complete

    def has_this_run(self) -> bool:
        """Whether the run that lies there is this one; False: none does.

        Raises:
            AnotherRun: another one does.
        """
        there, here = self.run_id(), self.run.read_json("run.json")["run_id"]
        if there not in (None, here):
            raise AnotherRun(
                f"{self.place} holds another run (id {there}, this one is {here}): give this run another run.name, or "
                "another checkpoint.mirror."
            )
        return there is not None

    def require_own(self) -> bool:
        """Whether this run lies there already.

        Raises:
            AnotherRun: another run does, or this one has been started elsewhere meanwhile.
        """
        if not self.has_this_run():
            return False
        theirs = self._store.read("ledger.jsonl") or b""
        if not _read(self.run.ledger_file).startswith(theirs):
            raise AnotherRun(
                f"{self.place}: this run has gone on elsewhere since it was last copied from here, so nothing is "
                "copied from here any more. Stop one of the two."
            )
        return True

    def send_records(self) -> None:
        """Bring the run's own files there up to date; which run it is comes last."""
        for name in (*RECORDS, "run.json"):
            data = _read(self.run.path / name)
            if data and self._sent.get(name) != data:
                self._store.write(name, data)
                self._sent[name] = data

    @property
    def records_sent(self) -> bool:
        """Whether the run's own files are there as they are here."""
        return all(_read(self.run.path / name) in (b"", self._sent.get(name)) for name in RECORDS)

    def send(self, folder: Path) -> None:
        """Copy a committed checkpoint there; it is held against deletion meanwhile.

        Raises:
            FileNotFoundError: it has been deleted; CheckpointError: it is bad; StoreError, AnotherRun, Interrupted.
        """
        with Hold(folder):
            self.require_own()
            manifest = read_manifest(folder, run_id=self.run.read_json("run.json")["run_id"])
            name = f"{CHECKPOINTS}/{folder.name}"

            def put(record: dict[str, Any]) -> None:
                expected = {"num_bytes": record["bytes"], "xxh3_128": record["xxh3_128"]}
                self._store.put(folder / record["file"], f"{name}/{record['file']}", **expected)

            with ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="mirror") as pool:
                list(pool.map(put, all_files(manifest)))
            text = _read(folder / MANIFEST)
            self._store.write(f"{name}/{MANIFEST}", text)
            self.require_own()
            self.send_records()
            self._store.write(f"{name}/{MARKER}", marker_text(text).encode())
        self.has(folder.name)
        assert self._complete is not None
        self._complete.add(folder.name)

    def retain(self, *, keep_last: int, keep_every_steps: int | None) -> None:
        """Delete there what is not to be kept, and what half uploads left; nothing while no whole one lies there."""
        found = self._store.sizes(CHECKPOINTS)
        complete = self.complete()
        names = kept(complete, keep_last=keep_last, keep_every_steps=keep_every_steps)
        if not names:
            return
        for name in sorted({path.partition("/")[0] for path in found} - names):
            if parse_checkpoint_name(name) is None:
                continue
            self._store.remove(f"{CHECKPOINTS}/{name}/{MARKER}")
            self._store.remove(f"{CHECKPOINTS}/{name}")
        self._complete = names

    def fetch_records(self) -> None:
        """Make the run directory from the copy; which run it is comes last."""
        for folder in (self.run.path, self.run.control, self.run.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        for name in (*RECORDS, "run.json"):
            data = self._store.read(name)
            if data is not None:
                write_atomic(self.run.path / name, data)

    def adopt_ledger(self) -> bool:
        """Take over what the run did elsewhere since its copy here; whether there was anything.

        Raises:
            AnotherRun: it has gone on here as well.
        """
        theirs, ours = self._store.read("ledger.jsonl") or b"", _read(self.run.ledger_file)
        if ours.startswith(theirs):
            return False
        if not theirs.startswith(ours):
            raise AnotherRun(
                f"{self.run.path} and its copy in {self.place} have gone separate ways: each has attempts that the "
                "other lacks. Go on with one: remove the other, or give this run another checkpoint.mirror."
            )
        for name in RECORDS:
            data = self._store.read(name)
            if data is not None:
                write_atomic(self.run.path / name, data)
        return True

    def fetch(self, name: str) -> Manifest:
        """Bring a checkpoint here: it appears whole and verified, or not at all.

        Raises:
            CheckpointError: the copy is bad; StoreError, OSError.
        """
        fresh, target = self.run.checkpoints / f".fetched-{name}", self.run.checkpoints / name
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            self._fetch_manifest(name, fresh)
            manifest = self._own_manifest(name, fresh)
            with ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="mirror") as pool:
                list(pool.map(lambda record: self._get(name, record, fresh), all_files(manifest)))
            read_table(fresh, manifest)
            sync_folder(fresh)
            set_aside(target, f"not committed; replaced by its copy from {self.place}")
            os.rename(fresh, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return manifest

    def heal(self, folder: Path, record: dict[str, Any]) -> None:
        """Replace one bad file of a checkpoint by its copy; the bad one is put aside.

        Raises:
            CheckpointError: the copy is bad, too; StoreError, OSError.
        """
        _require_own(folder)
        set_aside(folder / record["file"], "replaced by its copy in the mirror", keep=True)
        self._get(folder.name, record, folder)

    def heal_manifest(self, folder: Path) -> None:
        """Replace a bad manifest and marker by their copies; errors as of `heal`."""
        _require_own(folder)
        probe = folder.with_name(f".fetched-{folder.name}")
        shutil.rmtree(probe, ignore_errors=True)
        probe.mkdir()
        try:
            self._fetch_manifest(folder.name, probe)
            self._own_manifest(folder.name, probe)
            for name in (MANIFEST, MARKER):
                if (good := _read(probe / name)) != _read(folder / name):
                    set_aside(folder / name, "replaced by its copy in the mirror", keep=True)
                    write_atomic(folder / name, good)
        finally:
            shutil.rmtree(probe, ignore_errors=True)

    def _fetch_manifest(self, name: str, into: Path) -> None:
        for file in (MANIFEST, MARKER):
            data = self._store.read(f"{CHECKPOINTS}/{name}/{file}")
            if data is None:
                raise CheckpointError(f"{self.place}/{CHECKPOINTS}/{name}/{file}: is missing")
            write_atomic(into / file, data)

    def _own_manifest(self, name: str, folder: Path) -> Manifest:
        """That of a checkpoint of this run and name; the folder's own name says nothing."""
        manifest = read_manifest(folder, run_id=self.run.read_json("run.json")["run_id"])
        if checkpoint_name(manifest["step"], manifest["attempt"]) != name:
            raise CheckpointError(f"{self.place}/{CHECKPOINTS}/{name}: holds another checkpoint")
        return manifest

    def _get(self, name: str, record: dict[str, Any], folder: Path) -> None:
        expected = {"num_bytes": record["bytes"], "xxh3_128": record["xxh3_128"]}
        self._store.get(f"{CHECKPOINTS}/{name}/{record['file']}", folder / record["file"], **expected)


def set_aside(path: Path, reason: str, *, keep: bool = False) -> Path | None:
    """Put a bad checkpoint into checkpoints/bad with the reason beside it; nothing is deleted.

    keep: it is one file of a checkpoint that stays, and is about to be replaced
    Returns:
        Where it lies now; None where there was nothing.
    """
    if not os.path.lexists(path):
        return None
    checkpoints = path.parent.parent if keep else path.parent
    folder = checkpoints / BAD / (path.parent.name if keep else "")
    folder.mkdir(parents=True, exist_ok=True)
    number, target = 1, folder / path.name
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.name}.{number}"
    if keep:  # it keeps its place until another takes it, so that no crash leaves a gap
        os.link(path, target, follow_symlinks=False)
    else:
        os.rename(path, target)
    with contextlib.suppress(OSError):  # words only
        write_atomic(target.with_name(f"{target.name}.why"), f"{reason}\n")
    for changed in (path.parent, folder, checkpoints):
        sync_folder(changed)
    return target


def missing(mirror: Mirror, refs: Collection[CheckpointRef], names: Collection[str]) -> CheckpointRef | None:
    """The newest of these checkpoints that is among `names` and not in the mirror."""
    wanted = (ref for ref in sorted(refs, reverse=True) if ref.path.name in names)
    return next((ref for ref in wanted if not mirror.has(ref.path.name)), None)


def _require_own(folder: Path) -> None:
    if folder.is_symlink():
        raise CheckpointError(f"{folder.name}: is a symbolic link; nothing is written through it")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
