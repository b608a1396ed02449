"""How ranks finish a save without a collective: each leaves a verdict file, rank 0 gathers them, commits or removes.

Runs in a background thread and never touches torch.distributed. In the folder of a save, rank k writes its shard and
then `rank-k.done` (what the manifest must say of it); on failure it empties the shard, renames it to `rank-k.failed`,
which needs no space on a full disk. Rank 0 waits for a verdict of every rank. The others then wait for the marker to
appear or the folder to go.

A file that storage refuses for a reason that may pass is written anew, a few times (`retrying`). A folder whose fsync
failed is not asked again: the save has failed, and the next one makes a new folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.run.directory import MARKER
from launcher.run.files import FULL, is_there, remove, retrying, sync_folder, write_atomic
from launcher.run.ledger import StaleAttempt
from launcher.trainer.checkpoint.format import (
    CheckpointError,
    FileRecord,
    Snapshot,
    rank_file,
    stream_file,
    write_file,
)
from launcher.trainer.checkpoint.lanes import LanesTaken, check_lanes, lanes_snapshot
from launcher.trainer.checkpoint.reader import MANIFEST, Manifest, expected_ranges, header_metadata, marker_text
from launcher.trainer.checkpoint.retention import discard

GRACE_S = 30.0  # for the words of other ranks once one has failed
_DONE, _FAILED = ".done", ".failed"


class NoSpace(CheckpointError):
    """The disk is full, or a quota is used up.

    needs: bytes of the whole checkpoint
    """

    def __init__(self, text: str, *, needs: int) -> None:
        super().__init__(text)
        self.needs = needs


class Progress:
    """What a save is at, and when storage last answered; written by its thread, read by the training loop."""

    def __init__(self) -> None:
        self.doing, self.since = "", time.monotonic()

    def at(self, doing: str) -> None:
        """Storage has answered; from now on it is waited for with this."""
        self.doing = doing
        self.answered()

    def answered(self) -> None:
        self.since = time.monotonic()


@dataclass(slots=True)
class Save:
    """One save on one rank.

    folder: new and empty, made by rank 0 before any rank began
    snapshot: what this rank writes
    manifest: all but `files` and `kinds`; only rank 0 uses it
    patience_s: how long a peer may take longer than this rank
    fence: inside, no newer attempt begins; raises StaleAttempt on entry when one has
    lanes: gives the lanes of the stream that this rank owns; None: data are not streamed
    """

    folder: Path
    rank: int
    world_size: int
    snapshot: Snapshot
    manifest: Manifest
    patience_s: float
    fence: Callable[[], contextlib.AbstractContextManager[None]]
    lanes: LanesTaken | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a rank could not write its part.

    full: for want of space; bytes: size of its file
    """

    reason: str
    full: bool
    bytes: int


def carry_out(save: Save) -> int:
    """Write this rank's file and see the save through to its end.

    Returns:
        Size of this rank's file in bytes; the checkpoint is then durable and committed.
    Raises:
        CheckpointError: it failed here or elsewhere; the folder is gone, or goes when rank 0 learns of it.
    """
    size, failure = _write_own(save)
    if save.rank == 0:
        _conclude(save, failure)
    else:
        if failure:
            raise CheckpointError(failure.reason)
        _await_conclusion(save)
    return size


def _write_own(save: Save) -> tuple[int, _Failure | None]:
    path = save.folder / rank_file(save.rank)
    try:
        record = _write(save, path, save.snapshot)
        verdict = {**asdict(record), "elements": save.snapshot.elements, "stream": _write_lanes(save)}
        save.progress.at(f"leaving word of {path.name}")
        word = path.with_suffix(_DONE)
        retrying(lambda: write_atomic(word, json.dumps(verdict), durable=False), what=word)
    except Exception as error:  # whatever it was, rank 0 must hear of it
        what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        full = isinstance(error, OSError) and error.errno in FULL
        failure = _Failure(f"rank {save.rank}: {path.name}: {what}", full, save.snapshot.size)
        _report_failure(save, path, failure)
        return 0, failure
    return record.bytes, None


def _write(save: Save, path: Path, snapshot: Snapshot) -> FileRecord:
    """Each try makes a new file: after a failed fsync nobody knows what of the old one reached the disk."""
    save.progress.at(f"writing {path.name}")
    return retrying(lambda: write_file(path, snapshot, wrote=save.progress.answered), what=path)


def _write_lanes(save: Save) -> dict[str, Any] | None:
    """What the manifest says of the file of this rank's lanes; None where it owns none."""
    lanes = save.lanes() if save.lanes is not None else {}
    if not lanes:
        return None
    snapshot = lanes_snapshot(lanes, header_metadata(save.manifest, save.rank))
    record = _write(save, save.folder / stream_file(save.rank), snapshot)
    return {**asdict(record), "rank": save.rank, "lanes": sorted(lanes)}


def _report_failure(save: Save, path: Path, failure: _Failure) -> None:
    """Turn the shard into the verdict: emptying and renaming need no space; the reason is written if there is some."""
    deadline = time.monotonic() + save.patience_s
    while True:
        try:
            if not is_there(save.folder):
                return
            how = os.O_WRONLY | os.O_TRUNC | (0 if is_there(path) else os.O_CREAT)  # a new name may need space
            with open(os.open(path, how, 0o644), "wb", buffering=0) as file, contextlib.suppress(OSError):
                file.write(json.dumps(asdict(failure)).encode())
            path.rename(path.with_suffix(_FAILED))
            return
        except OSError:  # not even a name fits; peers that fail too will make room
            if time.monotonic() > deadline:
                return
            time.sleep(0.2)


def _conclude(save: Save, failure: _Failure | None) -> None:
    try:
        verdicts = _gather(save, {0: failure} if failure else {})
        if failures := [verdict for _, verdict in sorted(verdicts.items()) if isinstance(verdict, _Failure)]:
            silent = save.world_size - len(verdicts)  # their files are about as large as this one
            needs = sum(_bytes(verdict) for verdict in verdicts.values()) + silent * save.snapshot.size
            raise _refusal(save, failures, needs)
        _commit(save, [verdicts[rank] for rank in range(save.world_size)])
    except (CheckpointError, StaleAttempt, OSError) as error:
        _give_up(save)
        if isinstance(error, OSError):
            name = Path(str(error.filename or MANIFEST)).name
            error = CheckpointError(f"rank 0: {name}: {error.strerror or error}")
        if isinstance(error, NoSpace):
            error = NoSpace(f"{error}{_space(save.folder.parent, error.needs)}", needs=error.needs)
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error


def _refusal(save: Save, failures: list[_Failure], needs: int) -> CheckpointError:
    reasons = "; ".join(failure.reason for failure in failures)
    return NoSpace(reasons, needs=needs) if any(failure.full for failure in failures) else CheckpointError(reasons)


def _bytes(verdict: _Failure | dict[str, Any]) -> int:
    if isinstance(verdict, _Failure):
        return verdict.bytes
    stream = verdict["stream"]
    return int(verdict["bytes"]) + (int(stream["bytes"]) if stream else 0)


def _space(folder: Path, needs: int) -> str:
    """How much is needed and free there, as the end of a sentence; empty where the disk does not say."""
    free = free_bytes(folder)
    return "" if free is None else f" (the checkpoint needs {_amount(needs)}, {_amount(free)} are free)"


def free_bytes(folder: Path) -> int | None:
    """What may still be written in a folder; None where that cannot be found out."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _amount(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _give_up(save: Save) -> None:
    """Remove the folder, which frees the space; one that cannot be removed holds a word for the others."""
    own = save.folder / rank_file(0)
    try:
        discard(save.folder)
    except OSError:
        with contextlib.suppress(OSError):
            if not is_there(save.folder / MARKER):
                own.rename(own.with_suffix(_FAILED))


def _gather(save: Save, verdicts: dict[int, Any]) -> dict[int, Any]:
    """{rank: what its file is, or why it failed} once every rank has said so; `verdicts`: those known already.

    Once one has failed, the others are not waited for long.
    """
    waiting, waiting_for = _Patience(save.patience_s), None
    failed_at: float | None = None
    while True:
        for name in retrying(lambda: os.listdir(save.folder), what=save.folder):
            path = save.folder / name
            rank = int(path.stem.removeprefix("rank-")) if path.suffix in (_DONE, _FAILED) else -1
            if rank >= 0 and rank not in verdicts:
                verdicts[rank] = _verdict(path, rank, save.snapshot.size)
        if len(verdicts) == save.world_size:
            return verdicts
        if any(isinstance(verdict, _Failure) for verdict in verdicts.values()):
            failed_at = time.monotonic() if failed_at is None else failed_at
            if time.monotonic() - failed_at > GRACE_S:
                return verdicts
        missing = sorted(set(range(save.world_size)) - set(verdicts))
        if missing != waiting_for:
            waiting_for = missing
            save.progress.at(f"waiting for the files of ranks {missing}")
        if not waiting.on():
            raise CheckpointError(f"no word from ranks {missing} within {save.patience_s:g} s")


def _verdict(path: Path, rank: int, size: int) -> dict[str, Any] | _Failure:
    """What a rank left; `size`: of a file for which there was not even space to say how large it is."""
    text = retrying(path.read_text, what=path)
    if path.suffix == _DONE:
        values: dict[str, Any] = json.loads(text)
        return values
    try:
        return _Failure(**json.loads(text))
    except ValueError:
        return _Failure(f"rank {rank}: the disk is full", True, size)


def _commit(save: Save, verdicts: list[dict[str, Any]]) -> None:
    """Names of files, manifest, name of the folder, marker, each durable before the next; verdict files go first."""
    folder, manifest = save.folder, save.manifest
    elements: dict[str, int] = {}
    for verdict in verdicts:
        for kind, count in verdict.pop("elements").items():
            elements[kind] = elements.get(kind, 0) + count
    if streams := [stream for verdict in verdicts if (stream := verdict.pop("stream"))]:
        check_lanes(streams)
        manifest = {**manifest, "stream": streams}
    manifest = {**manifest, "kinds": sorted(elements), "files": verdicts}
    _check_count(manifest, elements)
    save.progress.at(f"writing {MANIFEST}")
    for name in retrying(lambda: os.listdir(folder), what=folder):
        if name.endswith(_DONE):
            remove(folder / name)
    sync_folder(folder)
    text = json.dumps(manifest, indent=1)
    write_atomic(folder / MANIFEST, text)
    sync_folder(folder.parent)
    save.progress.at(f"writing {MARKER}")
    with save.fence():
        write_atomic(folder / MARKER, marker_text(text.encode()))


def _check_count(manifest: Manifest, elements: dict[str, int]) -> None:
    """Never commit what could not be loaded: the ranks together must have written each element that is expected."""
    expected: dict[str, int] = {}
    for (_, kind), numel in expected_ranges(manifest).items():
        expected[kind] = expected.get(kind, 0) + numel
    if elements != {kind: numel for kind, numel in expected.items() if numel}:
        raise CheckpointError(f"the engine's pieces do not make up the model: {elements} elements, expected {expected}")


def _await_conclusion(save: Save) -> None:
    waiting = _Patience(2 * save.patience_s)
    given_up = (save.folder / rank_file(0)).with_suffix(_FAILED)
    save.progress.at("waiting for rank 0")
    while not is_there(save.folder / MARKER):
        if is_there(given_up) or not is_there(save.folder):
            raise CheckpointError("another rank failed; rank 0 has the reason")
        if not waiting.on():
            raise CheckpointError(f"rank 0 neither committed nor gave up within {2 * save.patience_s:g} s")


class _Patience:
    """Sleeps a little longer each time, until time is up."""

    def __init__(self, limit_s: float) -> None:
        self._deadline, self._pause_s = time.monotonic() + limit_s, 0.002

    def on(self) -> bool:
        """Sleep; False when the time is up."""
        if time.monotonic() > self._deadline:
            return False
        time.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 1.5, 0.5)
        return True


def make_folder(folder: Path) -> None:
    """A new, empty folder for a save; what an unfinished one of the same name left is removed.

    Raises:
        OSError: it cannot be made.
    """

    def make() -> None:
        if is_there(folder):
            discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(folder)

    retrying(make, what=folder)
