"""Who may drive a run: one live owner, proven by a file lock and, where locks do not reach, by a heartbeat that moves.

No clocks are compared. The lock dies with its process. The record in the same file says who holds it; it is written in
place, because a lock belongs to the file and not to its name. What a lost owner still writes, the ledger fences off.

A live owner is succeeded in one case: the scheduler has started the same job again, so the earlier start is a copy that
was cut off. Its lock cannot be had; the newcomer locks a file of its own and puts it in the place of the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.run.files import sync_folder
from launcher.run.ledger import latest_attempt, ledger_lock
from launcher.run.processes import boot_id, lives, pid_namespace, start_of

HEARTBEAT_S = 5.0
WATCH_S = 20.0  # four heartbeats
_SETTLE_S = 1.0  # a lock held without a live owner: somebody looks, or has just taken it and not yet signed
_PAUSE_S = 0.02
_RECORD_BYTES = 1024  # padded, so that each record covers the one before

_held: set[int] = set()  # descriptors of this process; a forked child closes its copies, or the lock would outlive us
_fork_hook = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Which start of which job this is, as its target tells.

    job_id: the same in each start of one submission
    restart: grows with each start, 0 at first
    """

    target: str
    job_id: str
    restart: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds a lease.

    boot_id, pid_namespace: of the running kernel and within it; pid and pid_start mean something only under the same
        ones (pid_namespace empty: written by an older launcher)
    pid_start: when the process started, clock ticks since boot; tells it from a later one with the same pid
    token: unlike for every holding
    heartbeat: grows while the owner lives
    since: Unix seconds on the owner's host, for people only
    released: given back in good order
    target, job_id, restart: of its `Submission`; empty and 0 where a person started it
    """

    host: str
    boot_id: str
    pid: int
    pid_start: int | None
    token: str
    since: float
    heartbeat: int = 0
    released: bool = False
    target: str = ""
    job_id: str = ""
    restart: int = 0
    pid_namespace: str = ""

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"

    def is_succeeded_by(self, submission: Submission | None) -> bool:
        """Whether a start is a later one of this owner's own job, which may take over while this owner lives."""
        if submission is None or not self.job_id:
            return False
        same = (self.target, self.job_id) == (submission.target, submission.job_id)
        return same and self.restart < submission.restart


class LeaseHeld(UserError):
    """Somebody else drives the run."""

    def __init__(self, message: str, owner: Owner | None) -> None:
        super().__init__(message)
        self.owner = owner


class Lease:
    """A held lease.

    taken_from: the owner it was taken over from, dead or an earlier start of the same job; None if it was free
    """

    def __init__(self, path: Path, handle: int, owner: Owner, taken_from: Owner | None) -> None:
        self.taken_from = taken_from
        self._path = path
        self._handle = handle
        self._owner = owner
        self._lost = False
        self._write = threading.Lock()

    @property
    def owner(self) -> Owner:
        return self._owner

    @property
    def lost(self) -> bool:
        """Whether another has taken the run over, seeing no heartbeat or being a later start; seen at the next beat."""
        return self._lost

    def beat(self) -> None:
        """Show that the owner lives; called by a thread of its own."""
        self._sign(replace(self._owner, heartbeat=self._owner.heartbeat + 1))

    def release(self) -> None:
        """Say that the owner left in good order; closing the file is what gives the lock back."""
        self._sign(replace(self._owner, released=True))

    def _sign(self, owner: Owner) -> None:
        with self._write, contextlib.suppress(OSError):  # a disk that fails shows as a heartbeat that stands still
            signed = _read(self._handle)
            if (signed is not None and signed.token != self._owner.token) or self._replaced():
                self._lost = True
            if not self._lost:
                _sign(self._handle, owner)
                self._owner = owner

    def _replaced(self) -> bool:
        """Whether another file lies in the place of ours; none at all is a run that was removed."""
        try:
            return not os.path.samestat(os.fstat(self._handle), os.stat(self._path))
        except FileNotFoundError:
            return False


@contextmanager
def hold_lease(
    run: RunDirectory,
    *,
    submission: Submission | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    watch_s: float = WATCH_S,
    waiting: Callable[[str], object] = lambda text: None,
) -> Iterator[Lease]:
    """Be the one who drives the run; makes the directory if need be.

    Args:
        submission: which start of which job this is; earlier ones of the same job are succeeded, dead or alive
        watch_s: how long the heartbeat of an owner on another host must stand still before the run is taken over; at
            least two of that owner's `heartbeat_s`
        waiting: called with a line for the user before such a watch, and when a live owner is succeeded
    Raises:
        LeaseHeld: somebody else does; UserError: a name inside of the run directory is a symbolic link.
    """
    run.require_no_links()
    run.control.mkdir(parents=True, exist_ok=True)
    path = run.control / "lease"
    handle, before = _obtain(run, path, submission, waiting)
    _keep_from_children(handle)
    try:
        if before is not None and not before.released and not before.is_succeeded_by(submission):
            _refuse_if_alive(run, handle, before, watch_s, waiting)
        owner = _this_process(submission)
        _sign(handle, owner)
        lease = Lease(path, handle, owner, before if before is not None and not before.released else None)
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(lease, ended, heartbeat_s), name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            if os.getpid() == owner.pid:  # not in a forked child that leaves by this way
                ended.set()
                thread.join()
                lease.release()
    finally:
        if handle in _held:
            _held.discard(handle)
            os.close(handle)


def current_owner(run: RunDirectory) -> tuple[Owner | None, bool | None]:
    """Who signed for the run last, and whether they live: None where that cannot be seen from here at once."""
    try:
        handle = os.open(run.control / "lease", os.O_RDONLY)
    except FileNotFoundError:
        return None, False
    try:
        owner = _read(handle)
        if owner is None or owner.released:
            return owner, False
        if _seen_from_here(owner):
            return owner, lives(owner.pid, owner.pid_start)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner, True
        return owner, False if _same_kernel(owner) else None
    finally:
        os.close(handle)


def _obtain(
    run: RunDirectory, path: Path, submission: Submission | None, waiting: Callable[[str], object]
) -> tuple[int, Owner | None]:
    """The locked file, and who signed for it last."""
    try:
        handle = _lock(run, path, submission)
    except LeaseHeld as held:
        if held.owner is None or not held.owner.is_succeeded_by(submission):
            raise
        assert submission is not None
        waiting(
            f"{run.path} is still held by {held.owner}, start {held.owner.restart} of {submission.target} job "
            f"{submission.job_id}: taken over, because this is start {submission.restart}"
        )
        return _replace(run, path, submission, held.owner)
    return handle, _read(handle)


def _replace(run: RunDirectory, path: Path, submission: Submission, before: Owner) -> tuple[int, Owner]:
    """A locked file of our own in the place of one that a live owner holds.

    Of two newcomers the second finds the first one's record there, and is refused unless it is a later start again.
    """
    with ledger_lock(run):
        with open(path, "rb") as file:
            now = _read(file.fileno())
        if now is None or (now.token != before.token and not now.is_succeeded_by(submission)):
            raise _held_by(run, now)
        fresh = path.with_name(f".lease.{uuid.uuid4().hex[:12]}")
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sign(handle, _this_process(submission))
            os.replace(fresh, path)
        except BaseException:
            os.close(handle)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            raise
        sync_folder(path.parent)
    return handle, now


def _lock(run: RunDirectory, path: Path, submission: Submission | None) -> int:
    """The locked file."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(handle)
            os.close(handle)
            known = owner is not None and (_lives_here(owner) or owner.is_succeeded_by(submission))
            if known or time.monotonic() >= deadline:
                raise _held_by(run, owner) from None
            time.sleep(_PAUSE_S)
            continue
        except OSError as error:
            os.close(handle)
            fix = "Mount it with locks, or put run.dir on another file system."
            raise UserError(f"{run.path}: its file system has no file locks ({error.strerror}). {fix}") from None
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
        os.close(handle)  # the directory was removed and made anew meanwhile
        run.control.mkdir(parents=True, exist_ok=True)


def _refuse_if_alive(
    run: RunDirectory, handle: int, before: Owner, watch_s: float, waiting: Callable[[str], object]
) -> None:
    """The lock was free, but its last holder did not give it back: dead, unless the lock does not reach its host."""
    if _lives_here(before):
        raise _held_by(run, before)
    if _same_kernel(before):
        return
    waiting(f"{run.path} was left by {before}: watching for {watch_s:.0f} s whether that owner still lives")
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        now = _read(handle)
        if now is not None and (now.token, now.heartbeat) != (before.token, before.heartbeat):
            raise _held_by(run, now)
        time.sleep(min(0.1, watch_s))


def _held_by(run: RunDirectory, owner: Owner | None) -> LeaseHeld:
    attempt = latest_attempt(run)
    if owner is None or owner.released or (_seen_from_here(owner) and not _lives_here(owner)):
        who = "a process that has not signed for it"
        fix = f"See `fuser {run.control / 'lease'}`; end that process and start again."
        return LeaseHeld(f"{run.path} is locked by {who}. {fix}", owner)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return LeaseHeld(
        f"{run.path} is being trained already: {owner}, attempt {attempt or 'not begun yet'}, since {since} there.\n"
        f"  watch it:                   launcher status {run.path}\n"
        f"  stop it with a checkpoint:  touch {run.control / 'stop-request'}\n"
        "  train beside it:            give run.name another value",
        owner,
    )


def _beat(lease: Lease, ended: threading.Event, every_s: float) -> None:
    while not ended.wait(every_s) and not lease.lost:
        lease.beat()


def _keep_from_children(handle: int) -> None:
    """A started program never gets the descriptor (close on exec); a plain fork does, and must drop it."""
    global _fork_hook
    if not _fork_hook:
        os.register_at_fork(after_in_child=_close_held)
        _fork_hook = True
    _held.add(handle)


def _close_held() -> None:
    while _held:
        os.close(_held.pop())


def _this_process(submission: Submission | None) -> Owner:
    return Owner(
        host=socket.gethostname(), boot_id=boot_id(), pid=os.getpid(), pid_start=start_of(os.getpid()),
        token=uuid.uuid4().hex, since=time.time(), pid_namespace=pid_namespace(),
        **(asdict(submission) if submission else {}),
    )  # fmt: skip


def _same_kernel(owner: Owner) -> bool:
    """Whether the owner's locks are seen here."""
    return owner.boot_id == boot_id() and (bool(owner.boot_id) or owner.host == socket.gethostname())


def _seen_from_here(owner: Owner) -> bool:
    """Whether the owner's pid means the same process here."""
    return _same_kernel(owner) and owner.pid_namespace in ("", pid_namespace())


def _lives_here(owner: Owner | None) -> bool:
    """Whether the one who signed is a live process that is seen from here and has not given the lease back."""
    return owner is not None and not owner.released and _seen_from_here(owner) and lives(owner.pid, owner.pid_start)


def _sign(handle: int, owner: Owner) -> None:
    os.pwrite(handle, json.dumps(asdict(owner)).encode().ljust(_RECORD_BYTES), 0)
    os.fsync(handle)


def _read(handle: int) -> Owner | None:
    """The record; None if there is none, or it is not whole."""
    try:
        values = json.loads(os.pread(handle, _RECORD_BYTES, 0))
        return Owner(**{f.name: values[f.name] for f in fields(Owner) if f.name in values})
    except (ValueError, TypeError):
        return None
