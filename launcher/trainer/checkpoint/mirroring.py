"""When a run is copied to its mirror, and when it comes back from there. No torch.

Whoever holds the run's lease copies, in a thread of that process: the launcher of node 0, or rank 0 where torchrun
starts the ranks. The thread looks for checkpoints that are committed, so it is no part of a save and no save waits for
it. A mirror that fails is a warning and tried again; it never ends a run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.run.ledger import CheckpointRef, attempts, latest_attempt, valid_checkpoints
from launcher.run.state import reached_end
from launcher.trainer.checkpoint.mirror import AnotherRun, Mirror, missing, place_of
from launcher.trainer.checkpoint.retention import kept
from launcher.trainer.checkpoint.store import Interrupted, StoreError
from launcher.trainer.checkpoint.verify import CheckpointError

if TYPE_CHECKING:
    from launcher.recipe.schema import Checkpoint

POLL_S = 1.0
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 600.0
LAST_TRIES = 3  # at the end of a run
AFTER_STOP_S = 15.0  # for what is still to be copied when a run stops before its end: its scheduler may be waiting
_LAST_RETRY_S = 2.0
_GIVE_UP_S = 5.0

Say = Callable[[str], object]


def open_mirror(run: RunDirectory, keys: Checkpoint, *, ended: Callable[[], bool] = lambda: False) -> Mirror | None:
    """The mirror that a recipe names for a run; None without one. Raises UserError where it cannot be opened here."""
    return None if keys.mirror is None else Mirror(run, place_of(keys.mirror, run.name), ended=ended)


def restore(run: RunDirectory, keys: Checkpoint, say: Say) -> None:
    """Bring back what the run directory lacks and the mirror has: the run itself, its newest checkpoint.

    The caller holds the lease and has not begun an attempt; the attempt that it begins accepts what was brought back.

    Raises:
        UserError: the mirror holds another run, or cannot be reached while the run cannot go on without it.
    """
    if (mirror := open_mirror(run, keys)) is None:
        return
    try:
        _restore(run, mirror, say)
    except AnotherRun as error:
        raise UserError(f"checkpoint.mirror: {error}") from None
    except StoreError as error:
        if not run.exists() or _lacks_checkpoints(run):
            raise UserError(
                f"checkpoint.mirror cannot be reached, and without it {run.path} cannot go on where it was: {error}. "
                "To begin without it: checkpoint.mirror=null."
            ) from None
        say(f"warning: mirror: {error}. The run goes on from what is here, and it is tried again.")


def _restore(run: RunDirectory, mirror: Mirror, say: Say) -> None:
    if mirror.run_id() is None:
        return
    if not run.exists():
        mirror.fetch_records()
        say(f"mirror: {run.path} was not here and is restored from {mirror.place}")
    elif mirror.has_this_run() and mirror.adopt_ledger():
        say(f"mirror: {run.path} had gone on elsewhere, which is taken over from {mirror.place}")
    mirror.require_own()
    newest = max(valid_checkpoints(run), default=None)
    problems = []
    for ref in reversed(mirror.complete()):
        if newest is not None and ref <= newest:
            break
        try:
            manifest = mirror.fetch(ref.path.name)
        except CheckpointError as error:
            problems.append(str(error))
            say(f"warning: mirror: bad checkpoint: {error}")
            continue
        say(f"mirror: restored {ref.path.name} ({len(manifest['files'])} files, verified) from {mirror.place}")
        return
    if newest is None and problems:
        raise UserError("\n".join([f"{mirror.place}: no checkpoint there is whole:", *problems]))


def _lacks_checkpoints(run: RunDirectory) -> bool:
    """Whether the run has had checkpoints and has none now."""
    had = any(attempt.accepts or attempt.end_step for attempt in attempts(run))
    return had and not valid_checkpoints(run)


@contextmanager
def mirrored(
    run: RunDirectory, keys: Checkpoint, say: Say, *, hurry: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """While this is open, what the run commits is copied; at its end what is left is waited for, or said to be missing.

    hurry: whether the person who waits wants it to end at once
    """
    if keys.mirror is None:
        yield
        return
    work = _Mirroring(run, keys, say)
    try:
        yield
    except BaseException:
        work.end()
        raise
    try:
        work.finish(hurry)
    finally:
        work.end()


class _Mirroring:
    """The thread, and how it stands."""

    def __init__(self, run: RunDirectory, keys: Checkpoint, say: Say) -> None:
        self._run, self._keys, self._say = run, keys, say
        self._mirror: Mirror | None = None
        self._bad: set[str] = set()
        self._ending, self._last, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._retry_at, self._failures, self._problem = 0.0, 0, ""
        self._refused = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def finish(self, hurry: Callable[[], bool]) -> None:
        """Wait until the copy is complete, as long as that gets on; say so, or what it lacks."""
        if not self._run.exists():  # discarded
            return
        finished = reached_end(self._run)
        deadline = time.monotonic() + AFTER_STOP_S
        self._failures, self._retry_at = 0, 0.0
        self._last.set()
        self._wake.set()
        while not self._idle.wait(0.05):
            given_up = self._failures >= LAST_TRIES or self._refused or hurry()
            if given_up or (not finished and time.monotonic() >= deadline):
                break
        if self._idle.is_set():
            newest = max(valid_checkpoints(self._run), default=None)
            if newest is not None and self._mirror is not None and self._mirror.has(newest.path.name):
                self._say(f"mirror: {newest.path.name} and the run's records are in {self._mirror.place}")
        elif not self._refused:
            place = place_of(self._keys.mirror or "", self._run.name)
            why = self._problem or "there was no time to copy it"
            again = f"launcher resume {self._run.path}" if finished else "the next start of the run"
            self._say(f"warning: mirror: {place} is not complete: {why}. It is completed by: {again}")

    def end(self) -> None:
        """Give up what is being copied; a store that does not answer is not waited for."""
        self._ending.set()
        self._wake.set()
        self._thread.join(_GIVE_UP_S)

    def _work(self) -> None:
        while not self._ending.is_set():
            if not self._refused and time.monotonic() >= self._retry_at:
                self._turn()
            self._wake.wait(0.05 if self._last.is_set() else POLL_S)
            if not self._last.is_set():
                self._wake.clear()

    def _turn(self) -> None:
        """Copy what is to be copied, one checkpoint after the other, the newest first."""
        last = self._last.is_set()  # what is done from now on knows how the run ended
        try:
            with contextlib.suppress(Interrupted):
                while not self._ending.is_set() and self._copy_one():
                    self._works()
                self._works()
                if last:
                    self._idle.set()
        except AnotherRun as error:
            self._refused = True
            self._say(f"warning: mirror: {error}")
        except (StoreError, UserError, OSError) as error:
            self._failures, self._problem = self._failures + 1, str(error)
            pause = min(FIRST_RETRY_S * 2 ** (self._failures - 1), LONGEST_RETRY_S)
            self._retry_at = time.monotonic() + (_LAST_RETRY_S if self._last.is_set() else pause)
            if self._failures == 1:
                self._say(f"warning: mirror: {error}. Training goes on and it is tried again.")

    def _works(self) -> None:
        if self._problem:
            self._say("mirror: it works again")
        self._failures, self._problem = 0, ""

    def _copy_one(self) -> bool:
        """Whether there was something to copy."""
        if not self._run.exists():
            return False
        ref = self._next()
        if ref is None:
            return self._update_records()
        try:
            self._opened().send(ref.path)
        except FileNotFoundError:  # deleted meanwhile
            return True
        except CheckpointError as error:
            self._bad.add(ref.path.name)
            self._say(f"warning: mirror: a bad checkpoint is not copied: {error}")
            return True
        self._opened().retain(keep_last=self._keys.keep_last, keep_every_steps=self._keys.keep_every_steps)
        return True

    def _next(self) -> CheckpointRef | None:
        """The newest checkpoint that is to be kept and is not there; the rehearsal's, of step 0, never is."""
        latest = latest_attempt(self._run)
        good = [ref for ref in valid_checkpoints(self._run) if ref.path.name not in self._bad]
        good = [ref for ref in good if ref.step > 0 or ref.attempt < latest]
        if not good:
            return None
        names = kept(good, keep_last=self._keys.keep_last, keep_every_steps=self._keys.keep_every_steps)
        return missing(self._opened(), good, names)

    def _update_records(self) -> bool:
        """Bring the records of a run that lies there up to date; a run without a checkpoint does not go there."""
        if not valid_checkpoints(self._run) or self._opened().records_sent:
            return False
        if self._opened().require_own():
            self._opened().send_records()
        return False

    def _opened(self) -> Mirror:
        if self._mirror is None:
            self._mirror = open_mirror(self._run, self._keys, ended=self._ending.is_set)
        assert self._mirror is not None
        return self._mirror
