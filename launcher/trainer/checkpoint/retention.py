"""Which checkpoints stay and how the others go: marker first, so that a crash in between leaves nothing that counts."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory, parse_checkpoint_name
from launcher.run.files import sync_folder


def retain(
    run: RunDirectory, *, attempt: int, keep_last: int, keep_every_steps: int | None, bad: Collection[str] = ()
) -> list[str]:
    """Delete each checkpoint of this and older attempts that is not to be kept, and remainders of unfinished ones.

    Kept are the newest `keep_last` and all whose step is a multiple of `keep_every_steps`. Checkpoints known to be
    `bad` do not count among them. While none is known to be good, none is deleted. A newer attempt's are left
    alone. Call only while nothing is being saved.

    Returns:
        Names of the deleted folders.
    """
    good = [ref for ref in ledger.valid_checkpoints(run) if ref.path.name not in bad]
    kept = {ref.path.name for ref in good[-keep_last:]}
    if keep_every_steps:
        kept |= {ref.path.name for ref in good if ref.step % keep_every_steps == 0}
    if not good:
        kept |= set(bad)
    return _delete_others(run, attempt, kept)


def sweep(run: RunDirectory, *, attempt: int) -> list[str]:
    """Delete what an older attempt left unfinished, or committed after a newer one had begun; valid checkpoints stay.

    Returns:
        Names of the deleted folders.
    """
    return _delete_others(run, attempt, {ref.path.name for ref in ledger.valid_checkpoints(run)})


def _delete_others(run: RunDirectory, attempt: int, kept: set[str]) -> list[str]:
    if ledger.latest_attempt(run) > attempt:  # a newer attempt owns the folder now
        return []
    deleted = []
    for folder in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else ():
        parsed = parse_checkpoint_name(folder.name)
        if parsed and parsed[1] <= attempt and folder.name not in kept:
            discard(folder)
            deleted.append(folder.name)
    return deleted


def discard(folder: Path) -> None:
    """Remove a checkpoint folder: first its marker, durably, then the rest.

    Raises:
        OSError: it cannot be removed.
    """
    marker = folder / MARKER
    if marker.exists():
        marker.unlink()
        sync_folder(folder)
    with contextlib.suppress(FileNotFoundError):  # an older owner removes its own leftovers too
        shutil.rmtree(folder)
