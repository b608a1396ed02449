"""Which checkpoints stay and how the others go: never while somebody reads one, and its marker first, so that a crash
in between leaves nothing that counts. No torch.

A reader holds a shared lock on the marker. Whoever deletes takes it alone, without waiting: what is being read stays
until the next time. The ledger is locked while a marker goes, so that no newer attempt accepts what is going.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory, parse_checkpoint_name
from launcher.run.files import is_there, list_folder, retrying, sync_folder
from launcher.run.ledger import CheckpointRef

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # then a reader is on its own, as docs/checkpoint.md says


class Hold:
    """A committed checkpoint that retention and `prune` leave alone until it is released.

    Raises:
        OSError: it is not committed (any more), or is a symbolic link.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _lock(self._handle, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(self._handle), os.stat(folder / MARKER)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / MARKER))
        except BlockingIOError:
            os.close(self._handle)
            raise FileNotFoundError(errno.ENOENT, "it is being deleted", str(folder / MARKER)) from None
        except BaseException:
            os.close(self._handle)
            raise

    def release(self) -> None:
        """Let go; nothing happens the second time."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # for a forked child's copy of the descriptor, too
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def kept(good: Sequence[CheckpointRef], *, keep_last: int, keep_every_steps: int | None) -> set[str]:
    """Names of those that stay, of good checkpoints in ascending order: the newest, and multiples of some steps."""
    names = {ref.path.name for ref in good[-keep_last:]}
    if keep_every_steps:
        names |= {ref.path.name for ref in good if ref.step % keep_every_steps == 0}
    return names


def retain(
    run: RunDirectory, *, attempt: int, keep_last: int, keep_every_steps: int | None, bad: Collection[str] = ()
) -> list[str]:
    """Delete each checkpoint of this and older attempts that is not to be kept, and remainders of unfinished ones.

    Kept are the newest `keep_last` and all whose step is a multiple of `keep_every_steps`. Checkpoints known to be
    `bad` do not count among them. While none is known to be good, none is deleted. A newer attempt's are left
    alone, and so is what is being read. Call only while nothing is being saved.

    Returns:
        Names of the deleted folders.
    Raises:
        OSError: some could not be deleted; the others were.
    """
    good = [ref for ref in ledger.valid_checkpoints(run) if ref.path.name not in bad]
    names = kept(good, keep_last=keep_last, keep_every_steps=keep_every_steps)
    if not good:
        names |= set(bad)
    return _delete_others(run, attempt, names)


def sweep(run: RunDirectory, *, attempt: int) -> list[str]:
    """Delete what an older attempt left unfinished, or committed after a newer one had begun; valid checkpoints stay.

    Returns:
        Names of the deleted folders.
    """
    return _delete_others(run, attempt, {ref.path.name for ref in ledger.valid_checkpoints(run)})


def unfinished(run: RunDirectory, *, attempt: int) -> list[str]:
    """Names of the checkpoints of this and older attempts that have no marker."""
    return [folder.name for folder in _folders(run, attempt) if not is_there(folder / MARKER)]


def _folders(run: RunDirectory, attempt: int) -> list[Path]:
    """Of this and older attempts, by name."""
    named = ((run.checkpoints / name, parse_checkpoint_name(name)) for name in sorted(list_folder(run.checkpoints)))
    return [folder for folder, key in named if key and key[1] <= attempt]


def _delete_others(run: RunDirectory, attempt: int, names: Collection[str]) -> list[str]:
    names = {*names, *ledger.lost_beginnings(run)}  # of a ledger that is not whole, nothing follows
    deleted: list[str] = []
    failure: OSError | None = None
    for folder in _folders(run, attempt):
        if folder.name not in names:
            try:
                if remove(run, folder, attempt=attempt):
                    deleted.append(folder.name)
            except ledger.StaleAttempt:  # a newer attempt owns the folder now
                break
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return deleted


def remove(run: RunDirectory, folder: Path, *, attempt: int) -> bool:
    """Delete a checkpoint, unless it is being read; whether it is gone.

    attempt: the newest one that the caller knows of
    Raises:
        StaleAttempt: a newer one has started; OSError: it cannot be removed.
    """
    with ledger.fenced(run, attempt):
        if not _withdraw(folder):
            return False
    discard(folder)
    return True


def _withdraw(folder: Path) -> bool:
    """Take the marker away, durably; False where somebody reads the checkpoint."""
    _require_own(folder)
    try:
        handle = os.open(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # NFS: a lock alone needs writing
    except FileNotFoundError:
        return True
    try:
        _lock(handle, fcntl.LOCK_EX)
        _unlink_marker(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def is_read(folder: Path) -> bool:
    """Whether somebody holds the checkpoint now."""
    try:
        handle = os.open(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        _lock(handle, fcntl.LOCK_EX)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def discard(folder: Path) -> None:
    """Remove a checkpoint folder, whoever reads it: first its marker, durably, then the rest.

    Raises:
        OSError: it cannot be removed.
    """
    _require_own(folder)
    _unlink_marker(folder)
    with contextlib.suppress(FileNotFoundError):  # an older owner removes its own leftovers too
        retrying(lambda: shutil.rmtree(folder), what=folder)


def _unlink_marker(folder: Path) -> None:
    try:
        os.unlink(folder / MARKER)
    except FileNotFoundError:
        return
    sync_folder(folder)


def _require_own(folder: Path) -> None:
    if retrying(folder.is_symlink, what=folder):
        raise OSError(errno.ELOOP, "is a symbolic link: nothing is deleted through it", str(folder))


def _lock(handle: int, kind: int) -> None:
    """Lock without waiting; where the file system has no locks, nothing is locked.

    Raises:
        BlockingIOError: another holds it.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
