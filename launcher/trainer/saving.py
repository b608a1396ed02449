"""When checkpoints are written, and what happens when one cannot be: the run goes on and tries again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher.trainer.failures import SaveError

if TYPE_CHECKING:
    from launcher.recipe.schema import Checkpoint
    from launcher.trainer.checkpoint.lanes import LanesTaken
    from launcher.trainer.checkpoint.manager import CheckpointManager, SaveStatus
    from launcher.trainer.engines import Engine
    from launcher.trainer.guards import Guards
    from launcher.trainer.interval import SaveInterval

FIRST_RETRY_S = 10.0
LONGEST_RETRY_S = 600.0
DURABLE_TRIES = 4
SPACE_LOOK_S = 5.0  # between two looks at the space that is free
STALL_S = 30.0  # without an answer of storage until that is said
_MARGIN = 1 << 16  # bytes for manifest, marker and folder


class Saver:
    """The checkpoints of a run.

    Args:
        step: the step of the checkpoint that was loaded, None when the run begins
        rank: rank 0 keeps the clock: saves by time and retries are its flag in the step's reduction
        lanes_behind: where data are streamed, the lanes of this rank as they are after a number of updates
        guards: what judges the steps, the same on every rank
        interval: on rank 0, with `checkpoint.every_steps: auto`, the time between saves
    """

    def __init__(
        self, manager: CheckpointManager, engine: Engine, checkpoint: Checkpoint, *, step: int | None, rank: int,
        lanes_behind: Callable[[int], LanesTaken] | None = None, guards: Guards | None = None,
        interval: SaveInterval | None = None,
    ) -> None:  # fmt: skip
        self._lanes_behind, self._guards, self.interval = lanes_behind, guards, interval
        self._manager, self._engine, self._keys, self._rank = manager, engine, checkpoint, rank
        self.saved_step = step
        self._last = time.monotonic()
        self._retry_at: float | None = None
        self._retry_s = FIRST_RETRY_S
        self._needs: int | None = None  # bytes that have to be free before it is tried again
        self._look_at = 0.0
        self._told_of_space = False  # that there is too little, since the last save that ended well
        self._stalled: float | None = None  # when storage last answered before it fell silent, once that was said
        self._problem = "another rank could not write its part"

    def due(self, step: int) -> bool:
        """Whether the number of steps alone asks for one; with auto, the steps that are kept for good do."""
        auto = self._keys.every_steps == "auto"
        every = self._keys.keep_every_steps if auto else self._keys.every_steps
        return isinstance(every, int) and step % every == 0

    def wanted(self) -> bool:
        """Rank 0's wish: the time has come, or a failed save is to be tried again.

        One that failed for want of space is, as soon as there is enough.
        """
        if self._rank:
            return False
        now, minutes = time.monotonic(), self._keys.every_minutes
        pays = self.interval is not None and self.interval.due(now, since=self._last)
        if self._retry_at is not None:
            return now >= self._retry_at or self._space_is_back(now)
        return pays or (minutes is not None and now - self._last >= 60 * minutes)

    def _space_is_back(self, now: float) -> bool:
        if self._needs is None or now < self._look_at:
            return False
        self._look_at = now + SPACE_LOOK_S
        free = self._manager.free_bytes()
        return free is not None and free >= self._needs

    def save(self, step: int) -> None:
        """Begin a checkpoint of this step; collective in the sense that every rank calls it.

        One that is still in flight is waited for: checkpoints are written in order, and there is memory for one copy.
        """
        self._await_save("The next checkpoint waits for it.")
        self._last, self._retry_at, self._needs = time.monotonic(), None, None
        self.saved_step = step
        self._engine.ensure_state()
        lanes = self._lanes_behind(step) if self._lanes_behind is not None else None
        self._manager.save(step, self._engine, self._state(step), lanes=lanes)

    def look(self) -> bool:
        """Whether a save has ended well since the last look; a failed one is said and put on the clock."""
        ended = False
        self._say_stall("Training goes on.")
        while (status := self._manager.poll()).state in ("done", "failed"):
            if status.state == "failed":
                self._postpone(status)
            else:
                ended, self._retry_s = True, FIRST_RETRY_S
                if self._told_of_space and self._rank == 0:
                    print(f"there is space again: the checkpoint of step {status.step} is written", flush=True)
                self._told_of_space = False
                if self.interval is not None and status.durable_s:
                    self.interval.measured(blocked_s=status.blocked_s, durable_s=status.durable_s)
                if status.reason and self._rank == 0:
                    print(f"warning: checkpoint of step {status.step}: {status.reason}", flush=True)
        return ended

    def save_durably(self, step: int, device: torch.device) -> None:
        """A checkpoint of this step on disk before this returns, on every rank.

        Raises:
            SaveError: on every rank, when it cannot be written in several tries.
        """
        for attempt in range(DURABLE_TRIES):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            if attempt or not self._all(self.saved_step == step, device):
                self.save(step)
            self._await_save("The run waits for its last checkpoint.")
            status = self._manager.wait()
            if status.state == "failed":
                self._postpone(status, then="It is tried again." if attempt + 1 < DURABLE_TRIES else "")
            if self._all(status.state != "failed", device):
                return
        raise SaveError(f"step {step}: no checkpoint could be written in {DURABLE_TRIES} tries: {self._problem}")

    @staticmethod
    def _all(good: bool, device: torch.device) -> bool:
        """Whether it holds on every rank; collective."""
        bad = torch.tensor(float(not good), device=device)
        dist.all_reduce(bad)
        return not bad.item()

    def _postpone(self, status: SaveStatus, *, then: str | None = None) -> None:
        """Say that a save failed and when there is another: by the clock, or once there is the space that it needs."""
        self.saved_step, self._problem = None, status.reason or self._problem
        now = time.monotonic()
        self._retry_at, self._needs = now + self._retry_s, None
        free = self._manager.free_bytes() if status.needs is not None else None
        if status.needs is not None and free is not None and free < status.needs + _MARGIN:
            self._needs, self._look_at = status.needs + _MARGIN, now + SPACE_LOOK_S
            self._retry_at = now + LONGEST_RETRY_S  # a disk may say less than is true
        known, self._told_of_space = self._told_of_space, self._needs is not None
        if then is None and known and self._told_of_space:
            return  # saves that fall due on a full disk are no news; one that ends well is, and is said
        if then is None:
            when = "as soon as there is space" if self._needs is not None else f"in {self._retry_s:.0f} s"
            then = f"Training goes on and it is tried again {when}."
        if self._rank == 0:
            print(f"warning: no checkpoint was written: {self._problem}. {then}".rstrip(), flush=True)
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _await_save(self, meanwhile: str) -> None:
        """Wait until no save is in flight; a stall is said, and so is its end."""
        while self._manager.in_flight(wait_s=1.0):
            self._say_stall(meanwhile)
        self._say_stall(meanwhile)

    def _say_stall(self, meanwhile: str) -> None:
        """Say once that storage does not answer, and since when; and once that it does again."""
        progress, now = self._manager.progress, time.monotonic()
        if self._stalled is not None and (progress.since > self._stalled or not self._manager.in_flight()):
            print(f"storage answers again, after {now - self._stalled:.0f} s", flush=True)
            self._stalled = None
        if self._stalled is None and now - progress.since >= STALL_S and self._manager.in_flight():
            self._stalled = progress.since
            at = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - progress.since)))
            print(
                f"warning: storage has not answered since {at}, for {now - progress.since:.0f} s: a checkpoint is "
                f"{progress.doing}. {meanwhile}",
                flush=True,
            )

    def _state(self, step: int) -> dict[str, Any]:
        guards = {} if self._guards is None else {"guards": self._guards.state()}
        return {"step": step, **self._engine.trainer_state(), **guards}
