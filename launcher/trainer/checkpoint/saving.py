"""How ranks finish a save without a collective: each leaves a verdict file, rank 0 gathers them, commits or removes.

Runs in a background thread and never touches torch.distributed. In the folder of a save, rank k writes its shard and
then `rank-k.done` (what the manifest must say of it); on failure it empties the shard, renames it to `rank-k.failed`,
which needs no space on a full disk. Rank 0 waits for a verdict of every rank. The others then wait for the marker to
appear or the folder to go.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.run.directory import MARKER
from launcher.run.files import sync_folder, write_atomic
from launcher.run.ledger import StaleAttempt
from launcher.trainer.checkpoint.format import CheckpointError, Snapshot, rank_file, stream_file, write_file
from launcher.trainer.checkpoint.lanes import LanesTaken, check_lanes, lanes_snapshot
from launcher.trainer.checkpoint.reader import MANIFEST, Manifest, expected_ranges, header_metadata, marker_text
from launcher.trainer.checkpoint.retention import discard

_DONE, _FAILED = ".done", ".failed"


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


def carry_out(save: Save) -> int:
    """Write this rank's file and see the save through to its end.

    Returns:
        Size of this rank's file in bytes; the checkpoint is then durable and committed.
    Raises:
        CheckpointError: it failed here or elsewhere; the folder is gone, or goes when rank 0 learns of it.
    """
    size, reason = _write_own(save)
    if save.rank == 0:
        _conclude(save, reason)
    else:
        if reason:
            raise CheckpointError(reason)
        _await_conclusion(save)
    return size


def _write_own(save: Save) -> tuple[int, str | None]:
    path = save.folder / rank_file(save.rank)
    try:
        record = write_file(path, save.snapshot)
        verdict = {**asdict(record), "elements": save.snapshot.elements, "stream": _write_lanes(save)}
        temporary = path.with_suffix(".done-tmp")
        temporary.write_text(json.dumps(verdict))
        temporary.rename(path.with_suffix(_DONE))
    except Exception as error:  # whatever it was, rank 0 must hear of it
        what = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        reason = f"rank {save.rank}: {path.name}: {what}"
        _report_failure(save, path, reason)
        return 0, reason
    return record.bytes, None


def _write_lanes(save: Save) -> dict[str, Any] | None:
    """What the manifest says of the file of this rank's lanes; None where it owns none."""
    lanes = save.lanes() if save.lanes is not None else {}
    if not lanes:
        return None
    snapshot = lanes_snapshot(lanes, header_metadata(save.manifest, save.rank))
    record = write_file(save.folder / stream_file(save.rank), snapshot)
    return {**asdict(record), "rank": save.rank, "lanes": sorted(lanes)}


def _report_failure(save: Save, path: Path, reason: str) -> None:
    """Turn the shard into the verdict: emptying and renaming need no space; the reason is written if there is some."""
    deadline = time.monotonic() + save.patience_s
    while save.folder.exists():
        try:
            with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
                file.write(reason.encode())
            path.rename(path.with_suffix(_FAILED))
            return
        except OSError:  # not even a name fits; peers that fail too will make room
            if time.monotonic() > deadline:
                return
            time.sleep(0.2)


def _conclude(save: Save, reason: str | None) -> None:
    try:
        verdicts = _gather(save)
        failures = [reason] if reason else []
        failures += [verdict for rank, verdict in sorted(verdicts.items()) if isinstance(verdict, str) and rank != 0]
        if failures:
            raise CheckpointError("; ".join(failures))
        _commit(save, [verdicts[rank] for rank in range(save.world_size)])
    except (CheckpointError, StaleAttempt, OSError) as error:
        with contextlib.suppress(OSError):
            discard(save.folder)
        if isinstance(error, OSError):
            raise CheckpointError(f"rank 0: {Path(str(error.filename or MANIFEST)).name}: {error.strerror}") from error
        raise CheckpointError(str(error)) from error


def _gather(save: Save) -> dict[int, Any]:
    """{rank: what its file is, or why it failed} once every rank has said so."""
    verdicts: dict[int, Any] = {}
    waiting = _Patience(save.patience_s)
    while True:
        for path in save.folder.iterdir():
            rank = int(path.stem.removeprefix("rank-")) if path.suffix in (_DONE, _FAILED) else -1
            if rank >= 0 and rank not in verdicts:
                text = path.read_text()
                verdicts[rank] = json.loads(text) if path.suffix == _DONE else text or f"rank {rank}: the disk is full"
        if len(verdicts) == save.world_size:
            return verdicts
        if not waiting.on():
            missing = sorted(set(range(save.world_size)) - set(verdicts))
            raise CheckpointError(f"no word from ranks {missing} within {save.patience_s:g} s")


def _commit(save: Save, verdicts: list[dict[str, Any]]) -> None:
    """Manifest, then the marker, each durable before the next; the verdict files go first."""
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
    for path in folder.iterdir():
        if path.suffix == _DONE:
            path.unlink()
    text = json.dumps(manifest, indent=1)
    write_atomic(folder / MANIFEST, text)
    sync_folder(folder)
    sync_folder(folder.parent)
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
    while not (save.folder / MARKER).exists():
        if not save.folder.exists():
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
    if folder.exists():
        discard(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.mkdir(folder)
