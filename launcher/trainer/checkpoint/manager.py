"""When a rank copies its state, who writes it, and which checkpoint a new attempt begins from.

Collectives run only in the calling thread (`save`, `load_latest`); the background thread talks by files (`saving.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from launcher.errors import UserError
from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.files import is_there, retrying
from launcher.trainer.checkpoint import retention
from launcher.trainer.checkpoint.format import HostBuffer, Piece, take_snapshot
from launcher.trainer.checkpoint.lanes import LanesTaken, read_lanes
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.checkpoint.saving import Progress, Save, carry_out, free_bytes, make_folder
from launcher.trainer.checkpoint.verify import (
    MANIFEST,
    VERSION,
    CheckpointError,
    Manifest,
    all_files,
    header_metadata,
    read_manifest,
    read_table,
    verify_files,
    why,
)

if TYPE_CHECKING:
    from launcher.trainer.checkpoint.mirror import Mirror

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a checkpoint needs of an engine; `launcher.trainer.engines.Engine` says more of each."""

    def ensure_state(self) -> None: ...
    def pieces(self) -> Iterable[Piece]: ...
    def set_step(self, step: int) -> None: ...
    def refresh(self) -> None: ...
    def parameter_shapes(self) -> dict[str, dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """How a save stands.

    state: `idle` when there is nothing to tell
    reason: why it failed; for a done save, what went wrong afterwards (retention), else None
    blocked_s: how long training stood still for it
    durable_s: from its beginning to its durable marker
    bytes: size of this rank's file
    needs: bytes of the whole checkpoint, where it failed for want of space; known on rank 0
    """

    state: Literal["idle", "in flight", "done", "failed"]
    step: int | None = None
    reason: str | None = None
    blocked_s: float = 0.0
    durable_s: float = 0.0
    bytes: int = 0
    needs: int | None = None


_IDLE = SaveStatus("idle")


class CheckpointManager:
    """Saves and loads a rank's part of a run's checkpoints; each rank makes one and calls its methods at the same step.

    Args:
        run: the run directory, on a file system that all ranks share
        keep_last, keep_every_steps: see `retention.retain`
        asynchronous: copy into a kept host buffer and write in a thread; else write from the live state and wait
        meta: goes into the manifest: `run_id` (required), and for instance engine, optimizer, fingerprints
        patience_s: how much longer than this rank a peer may take for one save
        mirror: opens the run's copy elsewhere, from which bad files are replaced; called when there are some
    """

    def __init__(
        self, run: RunDirectory, *, attempt: int, rank: int, world_size: int, meta: dict[str, Any], keep_last: int = 2,
        keep_every_steps: int | None = None, asynchronous: bool = True, patience_s: float = 1800.0,
        mirror: Callable[[], Mirror | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.run, self.attempt, self.rank, self.world_size = run, attempt, rank, world_size
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.meta, self.patience_s = meta, patience_s
        self._mirror = mirror
        self.problems: list[str] = []  # every bad file that `load_latest` met, by name, with the reason
        self.loaded: str | None = None  # name of the checkpoint that was loaded
        self._bad: set[str] = set()
        self._hold: retention.Hold | None = None  # on the checkpoint that is read; rank 0's until it has one of its own
        self.asynchronous = asynchronous
        self._buffer = HostBuffer(pinned=torch.cuda.is_available()) if asynchronous else None
        self._thread: threading.Thread | None = None
        self._finished: deque[SaveStatus] = deque()
        self._in_flight: int | None = None
        self.progress = Progress()  # of the save in flight, or of the last one

    def save(
        self, step: int, engine: Engine, trainer_state: dict[str, Any], *, lanes: LanesTaken | None = None
    ) -> None:
        """Begin a checkpoint of the state after `step` optimizer steps; how it ends, `poll` or `wait` say.

        Waits first for a save still in flight, so that memory for one copy is enough. Nothing is done when this attempt
        has committed this step already.

        Args:
            trainer_state: JSON-able; what beside the engine's pieces the loop needs to go on. That of rank 0 is kept.
            lanes: where data are streamed, gives this rank's lanes as they are behind the batch of this step; called
                later, in the thread
        """
        self._join()
        began = time.monotonic()
        folder = self.run.checkpoint(step, self.attempt)
        exists, refusal = self._from_rank_0(self._prepare(folder) if self.rank == 0 else None)
        if exists or refusal:
            self._finished.append(SaveStatus("failed" if refusal else "done", step, refusal))
            return
        engine.ensure_state()
        manifest = self._manifest(step, engine, trainer_state)
        snapshot = take_snapshot(engine.pieces(), header_metadata(manifest, self.rank), self._buffer)
        fence = partial(ledger.fenced, self.run, self.attempt)
        save = Save(folder, self.rank, self.world_size, snapshot, manifest, self.patience_s, fence, lanes)
        self._in_flight, self.progress = step, save.progress
        self._thread = threading.Thread(target=self._work, args=(save, began, time.monotonic()), daemon=True)
        self._thread.start()
        if self._buffer is None:
            self._join()

    def in_flight(self, *, wait_s: float = 0.0) -> bool:
        """Whether a save is on its way, after having waited for it so long at most."""
        if self._thread is None:
            return False
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def free_bytes(self) -> int | None:
        """What may still be written below checkpoints/; None where that cannot be found out."""
        return free_bytes(self.run.checkpoints)

    def poll(self) -> SaveStatus:
        """How the oldest save ended that was not told yet, else whether one is in flight. Each end is told once.

        A failure carries its reason on rank 0 and on the rank where it happened; the others know that there was one.
        """
        if self._finished:
            return self._finished.popleft()
        return _IDLE if self._in_flight is None else SaveStatus("in flight", self._in_flight)

    def wait(self) -> SaveStatus:
        """Wait for the save in flight; how the newest save ended, if not told yet (older ones stay with `poll`)."""
        self._join()
        return self._finished.pop() if self._finished else _IDLE

    def load_latest(self, engine: Engine, *, given: Container[str] = ()) -> dict[str, Any] | None:
        """Put the newest good checkpoint into the engine, whatever engine and number of ranks wrote it.

        Every file is hashed once over the ranks before any byte is used. What is bad is logged by name on rank 0 and
        listed in `problems`, and the checkpoint before it is tried. What older attempts left unfinished is deleted.

        Args:
            given: names of frozen parameters that have their values already: a checkpoint may hold them or not
        Returns:
            The saved trainer_state, or None when the run has no checkpoint.
        Raises:
            CheckpointError: there are checkpoints but all are bad, or the model is another one; equal on all ranks.
        """
        found = ([ref.path.name for ref in ledger.valid_checkpoints(self.run)], ledger.lost_beginnings(self.run))
        names, lost = self._from_rank_0(found if self.rank == 0 else None)
        if lost:
            fix = f"launcher checkpoint repair {self.run.path} writes it anew"
            raise CheckpointError(f"{self.run.ledger_file}: does not know who wrote {', '.join(lost)}: {fix}")
        if self.rank == 0:
            for name in retention.unfinished(self.run, attempt=self.attempt):
                print(f"{name}: has no {MARKER}, as a save that was cut short leaves it: it does not count", flush=True)
        state = None
        for name in reversed(names):
            folder = self.run.checkpoints / name
            reader, problems = self._open(folder)
            if reader is not None:
                state = self._load(reader, engine, given)
                self.loaded = name
                break
            self._bad.add(name)
            self.problems += problems
            if self.rank == 0:
                for problem in problems:
                    print(f"warning: bad checkpoint: {problem}", flush=True)
        if self.rank:
            self._release()
        if names and state is None:
            fix = f"To mend what can be mended: launcher checkpoint repair {self.run.path}"
            head = "every checkpoint of this run is bad; none was deleted:"
            raise CheckpointError("\n".join([head, *self.problems, fix]))
        if self.rank == 0:
            try:
                for name in retention.sweep(self.run, attempt=self.attempt):
                    log.info("removed %s: unfinished or void", name)
            except OSError as error:
                log.warning("what an older attempt left could not be removed: %s; it is tried again later", error)
        return state

    def reserve(self, num_bytes: int) -> None:
        """Take the memory for the copy of an asynchronous save now.

        Raises:
            MemoryError, RuntimeError: there is none.
        """
        if self._buffer is not None:
            self._buffer.take(num_bytes)

    def read_back(self, name: str, engine: Engine, *, given: Container[str] = ()) -> dict[str, Any]:
        """Verify one checkpoint and put it into the engine as `load_latest` would; the saved trainer_state.

        Raises:
            CheckpointError: it is bad; equal on all ranks.
        """
        reader, problems = self._open(self.run.checkpoints / name)
        if reader is None:
            raise CheckpointError("; ".join(problems))
        try:
            return self._load(reader, engine, given)
        finally:
            self._release()

    def load_lanes(self, wanted: Collection[int], *, of: str) -> dict[int, dict[str, NDArray[Any]]] | None:
        """These lanes of the stream in the checkpoint that was loaded, whichever ranks wrote them.

        Args:
            of: the stream's fingerprint, as `meta` has it under `stream_of`
        Returns:
            None where no checkpoint was loaded, or none of this stream.
        Raises:
            CheckpointError: it does not hold one of them.
        """
        if self.loaded is None:
            return None
        folder = self.run.checkpoints / self.loaded
        manifest = read_manifest(folder, run_id=self.meta["run_id"])
        if manifest.get("stream_of") != of:
            return None
        return retrying(lambda: read_lanes(folder, manifest, wanted), what=folder)

    def _prepare(self, folder: Path) -> tuple[bool, str | None]:
        """(this step is committed already, why there can be no save)."""
        try:
            with ledger.fenced(self.run, self.attempt):
                if is_there(folder / MARKER) and folder.name not in self._bad:
                    return True, None
                make_folder(folder)
        except ledger.StaleAttempt as error:
            return False, str(error)
        except OSError as error:
            return False, f"rank 0: {folder.name}: {error.strerror}"
        return False, None

    def _manifest(self, step: int, engine: Engine, trainer_state: dict[str, Any]) -> Manifest:
        return {
            "version": VERSION, **self.meta, "step": step, "attempt": self.attempt, "world_size": self.world_size,
            "params": engine.parameter_shapes(), "trainer_state": trainer_state,
        }  # fmt: skip

    def _work(self, save: Save, began: float, copied: float) -> None:
        """The thread: every way it can end becomes a status."""
        step, size, reason, state, needs = save.manifest["step"], 0, None, "done", None
        try:
            size = carry_out(save)
        except Exception as error:
            state, reason, needs = "failed", str(error) or repr(error), getattr(error, "needs", None)
        if state == "done" and save.rank == 0:
            reason = self._retain()
        now = time.monotonic()
        blocked = (now if self._buffer is None else copied) - began
        self._finished.append(SaveStatus(state, step, reason, blocked, now - began, size, needs))  # type: ignore[arg-type]
        self._in_flight = None

    def _retain(self) -> str | None:
        self._release()
        try:
            keep_last, keep_every_steps = self.keep_last, self.keep_every_steps
            retention.retain(
                self.run, attempt=self.attempt, keep_last=keep_last, keep_every_steps=keep_every_steps, bad=self._bad
            )
        except OSError as error:
            return f"an old checkpoint could not be removed: {error}"
        return None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _open(self, folder: Path) -> tuple[Reader | None, list[str]]:
        """A reader, or what is wrong; the same answer on every rank. What is read is held against deletion."""
        self._release()
        manifest, mine, told = None, [], []
        if self._from_rank_0(self._bad_manifest(folder) if self.rank == 0 else None):
            told = self._from_rank_0(self._heal(folder, None) if self.rank == 0 else None)
        try:
            self._hold = retrying(lambda: retention.Hold(folder), what=folder)
            manifest = read_manifest(folder, run_id=self.meta["run_id"])
            for number in range(self.rank, len(all_files(manifest)), self.world_size):
                if wrong := verify_files(folder, manifest, [number]):
                    told += self._heal(folder, all_files(manifest)[number])
                    mine += wrong if verify_files(folder, manifest, [number]) else []
        except CheckpointError as error:
            mine = [str(error)]
        except OSError as error:
            mine = [f"{folder.name}: {MARKER}: {why(error)}"]
        said = self._from_all((mine, told))
        problems = sorted({problem for part, _ in said for problem in part})
        if self.rank == 0:
            for line in sorted({line for _, lines in said for line in lines}):
                print(line, flush=True)
        if problems:
            self._release()
            return None, problems
        assert manifest is not None
        table, problem = None, None
        if self.rank == 0:
            try:
                table = read_table(folder, manifest)
            except CheckpointError as error:
                problem = str(error)
        table, problem = self._from_rank_0((table, problem))
        return (None, problem.splitlines()) if problem else (Reader(folder, manifest, table), [])

    def _bad_manifest(self, folder: Path) -> bool:
        try:
            read_manifest(folder, run_id=self.meta["run_id"])
        except CheckpointError:
            return True
        return False

    def _heal(self, folder: Path, record: dict[str, Any] | None) -> list[str]:
        """Replace a bad file, or the manifest and its marker, from the mirror; what is to be said of it."""
        from launcher.trainer.checkpoint.store import StoreError

        name = f"{folder.name}/{record['file'] if record else MANIFEST}"
        try:
            mirror = self._mirror()
            if mirror is None:
                return []
            if record is None:
                mirror.heal_manifest(folder)
            else:
                mirror.heal(folder, record)
        except (StoreError, UserError, CheckpointError, OSError) as error:
            return [f"warning: mirror: {name} is bad and could not be replaced: {error}"]
        return [f"warning: mirror: {name} was bad and is replaced by its copy in {mirror.place}"]

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def _load(self, reader: Reader, engine: Engine, given: Container[str]) -> dict[str, Any]:
        stored, wanted = reader.manifest["params"], engine.parameter_shapes()
        differences = _differences(
            {name: entry for name, entry in stored.items() if name in wanted or name not in given},
            {name: entry for name, entry in wanted.items() if name in stored or name not in given},
        )
        if differences:
            raise CheckpointError(f"{reader.folder.name} is of another model: " + "; ".join(differences))
        if self.rank == 0 and (rounded := _rounded(stored, wanted)):
            log.warning("%s: %s wider there than this engine keeps them; they are rounded", reader.folder.name, rounded)
        engine.ensure_state()
        for piece in engine.pieces():
            if piece.name in given and piece.name not in stored:
                continue
            reader.read_into(piece.name, piece.kind, piece.start, piece.tensor)
        engine.set_step(reader.manifest["step"])
        engine.refresh()
        return dict(reader.manifest["trainer_state"])

    def _from_rank_0(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _from_all(self, value: Any) -> list[Any]:
        """Every rank's value on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _rounded(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`n parameters are`, of those whose type here is narrower than the one in which they are stored; empty if none."""
    pairs = ((stored[name]["dtype"], entry["dtype"]) for name, entry in wanted.items() if name in stored)
    count = sum(getattr(torch, there).itemsize > getattr(torch, here).itemsize for there, here in pairs)
    return f"{count} parameter{'s are' if count > 1 else ' is'}" if count else ""


def _differences(stored: dict[str, Any], wanted: dict[str, Any], limit: int = 5) -> list[str]:
    """Sentences on parameters that are missing, too many or of another shape."""
    found = [f"{name} is not in it" for name in wanted if name not in stored]
    found += [f"it holds {name}, which the model has not" for name in stored if name not in wanted]
    found += [
        f"{name} is {stored[name]['shape']}, the model's is {entry['shape']}"
        for name, entry in wanted.items()
        if name in stored and list(stored[name]["shape"]) != list(entry["shape"])
    ]
    found += [
        f"{name} is trained now and was not then"
        for name, entry in wanted.items()
        if name in stored and entry["trainable"] and not stored[name]["trainable"]
    ]
    return found[:limit] + ([f"and {len(found) - limit} more"] if len(found) > limit else [])
