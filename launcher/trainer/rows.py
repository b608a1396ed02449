"""The rows of the next step, made into tensors by one thread while the current step runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from launcher.data.batches import Batches
from launcher.errors import UserError
from launcher.trainer.checkpoint.lanes import LanesTaken
from launcher.trainer.failures import DataError
from launcher.trainer.objectives import Batch, Objective, to_batch
from launcher.trainer.stream import StreamBatches

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepRows:
    """One rank's share of a global batch, ready for the engine; it carries its own position.

    step: updates finished before it
    micro: micro-batches, the same number on every rank
    weight: sum of trained weights of the global batch, the loss's denominator
    tokens: real tokens of the global batch
    source_tokens: of them, those of each source
    cost: sum of squared document lengths of the global batch
    wait_s: seconds the loop waited for it
    """

    step: int
    micro: list[Batch]
    weight: float
    tokens: int
    source_tokens: tuple[int, ...]
    cost: float
    wait_s: float = 0.0


class Prefetch:
    """Builds one step ahead; `take` hands steps out in order.

    Args:
        first: the first step that will be taken
        last: one more than the last
    """

    def __init__(
        self, batches: Batches | StreamBatches, objective: Objective, *, backend: str, device: torch.device, first: int,
        last: int,
    ) -> None:  # fmt: skip
        self._batches, self._objective, self._backend, self._device = batches, objective, backend, device
        self._last = last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._next: Future[StepRows] | None = self._thread.submit(self._build, first) if first < last else None

    def take(self, step: int) -> StepRows:
        """The rows of a step, on the device; starts building the one after it.

        Raises:
            DataError: a row cannot be read.
        """
        assert self._next is not None, "no step is left"
        begin = time.perf_counter()
        ready = self._next.result()
        assert ready.step == step, f"rows of step {ready.step} prefetched, step {step} asked for"
        self._next = self._thread.submit(self._build, step + 1) if step + 1 < self._last else None
        micro = [batch.to(self._device) for batch in ready.micro]
        return replace(ready, micro=micro, wait_s=time.perf_counter() - begin)

    @property
    def lanes_behind(self) -> Callable[[int], LanesTaken] | None:
        """What a checkpoint keeps of a stream, see `StreamBatches.behind`; None where rows come from stores."""
        return self._batches.behind if isinstance(self._batches, StreamBatches) else None

    def records(self, step: int) -> dict[str, list[int]] | None:
        """{source file: records} of the whole global batch of a step that was taken, on every rank; collective.

        None where a stream has forgotten them.
        """
        return self._batches.records(step)

    def close(self, *, failed: bool = False) -> None:
        """Drop what was built ahead.

        Other ranks need this one for the batch of a stream that is under way, so it is built to its end first; after a
        failure nobody waits for anybody.
        """
        if isinstance(self._batches, StreamBatches):
            if failed:
                self._batches.abandon()
            elif self._next is not None:
                wait([self._next])
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _build(self, step: int) -> StepRows:
        data = read_guarded(lambda: self._batches.step(step), f"step {step}")
        micro = []
        for one in data.micro:
            self._objective.check(one)
            batch = to_batch(one, backend=self._backend)
            micro.append(batch.pin() if self._device.type == "cuda" else batch)
        if data.weight <= 0:
            raise DataError(f"step {step}: no token of its {len(data.rows)} rows is trained. Check data.train_on.")
        return StepRows(step, micro, data.weight, data.tokens, data.source_tokens, data.cost)


def read_guarded(read: Callable[[], _T], what: str) -> _T:
    """Call `read`; anything but a user's mistake or a lost connection becomes a DataError that says which rows."""
    try:
        return read()
    except (UserError, DataError, ConnectionError):
        raise
    except Exception as error:
        raise DataError(f"{what}: the rows cannot be read: {type(error).__name__}: {error}") from error
