"""The global batches of streamed data as one rank sees them: its own lanes, and what all ranks' lanes add up to.

What a store knows of a global batch, its weight above all, nobody knows of a stream before it is read. The ranks add it
up in the prefetch thread, on the host, over a process group of its own, one step ahead: the loop waits for no one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from launcher.data.batches import MicroBatch, StepBatch
from launcher.data.lanes import LaneState, Streamed
from launcher.data.stream import Lanes, lanes_of, told
from launcher.errors import UserError
from launcher.trainer.checkpoint.lanes import LanesTaken
from launcher.trainer.failures import DataError

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.distributed import Ranks

_LONGEST_PAUSE_S = 0.005
_REMEMBERED = 64  # steps whose records are known, for those that are left out
_KEPT = 4  # steps whose states are kept: the prefetcher is one ahead of the loop, a save one behind
_NETWORK = ("aiohttp", "botocore", "httpx", "huggingface_hub", "requests", "urllib3")  # whose errors are no bad data


class StreamBatches:
    """Takes the place of `launcher.data.batches.Batches` for the prefetcher; steps are asked for in order.

    Args:
        lanes: those of this rank
        first: the first step that will be asked for
        last: one more than the last
    """

    def __init__(
        self, lanes: Lanes, *, global_batch_size: int, micro_batch_size: int, ranks: int, first: int, last: int
    ) -> None:
        self._lanes, self._rows, self._micro_batch_size = lanes, global_batch_size, micro_batch_size
        self._group = dist.new_group(backend="gloo") if ranks > 1 else None
        self._abandoned = threading.Event()
        self._next, self._last, self._told, self._epochs = first, last, 0, 1
        self._behind = {first: lanes.state()}
        self._records: dict[int, dict[str, list[int]]] = {}

    def step(self, step: int) -> StepBatch:
        """This rank's part of a step, and what the whole global batch holds.

        Raises:
            DataError: on every rank alike, when one of them cannot read its rows; names file and record.
            ConnectionError: other ranks, or what holds the files, cannot be reached.
        """
        assert step == self._next, f"step {step} asked for, {self._next} is next"
        self._next += 1
        part, failure = self._read(step)
        state = self._lanes.state()
        self._behind[step + 1] = state
        self._behind.pop(step + 1 - _KEPT, None)
        losses = told(state)
        lost = sum((*losses.dropped.values(), *losses.changed.values()))
        own = [part.weight, part.cost, float(failure is not None), float(lost), *part.source_tokens]
        weight, cost, failed, all_lost, *tokens = self._added(own)
        if failed:
            raise _as_error(next(f for f in self._gathered(failure) if f is not None))
        if all_lost >= max(1, 2 * self._told) or (all_lost > self._told and step + 1 == self._last):
            self._told = int(all_lost)
            self._say(state)
        self._say_epochs(state)
        rows = np.arange(step * self._rows, (step + 1) * self._rows, dtype=np.int64)
        of_sources = tuple(int(count) for count in tokens)
        return StepBatch(part.micro, weight, sum(of_sources), of_sources, cost, rows)

    def behind(self, step: int) -> LanesTaken:
        """The lanes of this rank as they are after `step` updates, whatever has been read ahead since."""
        state = self._behind[step]
        return lambda: {number: lane.arrays() for number, lane in state.items()}

    def records(self, step: int) -> dict[str, list[int]] | None:
        """{source file: places in it} of all documents of a step's global batch; None when it is too long ago.

        Collective over the ranks of training, not over the group that this class adds its rows up in.
        """
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._records.get(step))
        if None in parts:
            return None
        sources = sorted({source for part in parts for source in part})
        return {source: sorted({at for part in parts for at in part.get(source, ())}) for source in sources}

    def abandon(self) -> None:
        """Wait for no other rank any more."""
        self._abandoned.set()

    def _read(self, step: int) -> tuple[_Part, _Failure | None]:
        try:
            rows = self._lanes.rows()
            micro = self._lanes.lay(rows, step=step, micro_batch_size=self._micro_batch_size)
        except Exception as error:
            return _Part([], 0.0, 0.0, [0] * len(self._lanes.names)), _failure(error, step)
        records: dict[str, list[int]] = {}
        for document in (document for row in rows for document in row):
            records.setdefault(self._lanes.source(document), []).append(document.at)
        self._records[step] = records
        self._records.pop(step - _REMEMBERED, None)
        return _Part.of(micro, rows, sources=len(self._lanes.names)), None

    def _added(self, numbers: list[float]) -> list[float]:
        """The sums over all ranks.

        Raises:
            ConnectionError: a rank is gone, or this one is ending.
        """
        if self._group is None:
            return numbers
        vector, pause_s = torch.tensor(numbers, dtype=torch.float64), 0.0002
        try:
            work = dist.all_reduce(vector, group=self._group, async_op=True)
            while not work.is_completed():
                if self._abandoned.wait(pause_s):
                    raise ConnectionError("this rank is ending")
                pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
            work.wait()
        except RuntimeError as error:  # as gloo says that a peer is gone
            raise ConnectionError(f"the ranks could not add up their rows: {error}") from error
        found: list[float] = vector.tolist()
        return found

    def _gathered(self, value: Any) -> list[Any]:
        """Every rank's value; all ranks call it at the same step.

        Raises:
            ConnectionError: a rank is gone.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ConnectionError(f"the ranks could not tell each other of their rows: {error}") from error
        return values

    def _say(self, state: dict[int, LaneState]) -> None:
        """What was lost so far over all ranks: rank 0 says it whenever it has doubled, and at the end."""
        mine = told(state)
        parts = self._gathered((mine.dropped, mine.changed, mine.first))
        if 0 not in state:
            return
        for number, what in ((0, "dropped"), (1, "changed")):
            for reason in sorted({reason for part in parts for reason in part[number]}):
                count = sum(part[number].get(reason, 0) for part in parts)
                first = next(part[2][reason] for part in parts if reason in part[2])
                print(f"stream: {what}: {count:,} ({reason}; the first is {first})", flush=True)

    def _say_epochs(self, state: dict[int, LaneState]) -> None:
        """Rank 0 says when its first lane goes round again: at the second, the third, the fifth, the ninth time ..."""
        if 0 in state and (epoch := max(p.epoch for p in state[0].positions)) >= self._epochs:
            self._epochs = 2 * epoch
            source = self._lanes.names[max(range(len(state[0].positions)), key=lambda i: state[0].positions[i].epoch)]
            print(f"stream: {source} has ended, epoch {epoch + 1} of it begins", flush=True)


def open_stream(
    recipe: Recipe, entry: Mapping[str, Any], manager: CheckpointManager, *, ranks: Ranks, first: int, last: int
) -> StreamBatches:
    """This rank's lanes, from the checkpoint that was loaded or from the beginning; collective.

    Args:
        entry: the entry `train` of data.json
    Raises:
        UserError: the sources are no longer what they were when the data were prepared.
    """
    batch = recipe.train.global_batch_size
    mine = lanes_of(ranks.rank, ranks=ranks.world_size, lanes=batch)
    manager.meta["stream_of"] = entry["fingerprint"]
    states = manager.load_lanes(mine, of=entry["fingerprint"])
    if states is None and manager.loaded is not None and ranks.rank == 0:
        print("warning: the checkpoint is not of this stream (--force), which therefore begins anew", flush=True)
    lanes = Lanes(recipe, entry, rank=ranks.rank, ranks=ranks.world_size, states=states)
    return StreamBatches(
        lanes, global_batch_size=batch, micro_batch_size=recipe.train.micro_batch_size, ranks=ranks.world_size,
        first=first, last=last,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank brings to a global batch."""

    micro: list[MicroBatch]
    weight: float
    cost: float
    source_tokens: list[int]

    @classmethod
    def of(cls, micro: list[MicroBatch], rows: list[tuple[Streamed, ...]], *, sources: int) -> _Part:
        tokens = [0] * sources
        for document in (document for row in rows for document in row):
            tokens[document.source] += int(document.tokens.size)
        weight = sum(float(one.weights.sum(dtype=np.float64)) for one in micro)
        cost = sum(float((document.tokens.size) ** 2) for row in rows for document in row)
        return cls(micro, weight, cost, tokens)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a rank could not read its rows; travels to the other ranks."""

    network: bool
    text: str


def _failure(error: Exception, step: int) -> _Failure:
    network = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in _NETWORK
    if isinstance(error, (UserError, DataError)):
        return _Failure(False, str(error))
    return _Failure(network, f"step {step}: the rows cannot be read: {type(error).__name__}: {error}")


def _as_error(failure: _Failure) -> Exception:
    return ConnectionError(failure.text) if failure.network else DataError(failure.text)
