"""What one rank feeds to the model: a step's rows dealt to ranks, cut into micro-batches, laid out as padded arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.mix import Mix
from launcher.data.order import deal
from launcher.data.store import Store

_MULTIPLE = 8  # row lengths that tensor cores like
_Unit = tuple[int, NDArray[np.int64]]  # row, and the documents of it that are laid


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward on one rank; B rows of T tokens.

    input_ids: [B, T] int64
    position_ids: [B, T] int64, restarts at 0 in every document and in the padding
    targets: [B, T] int64, the next token of the same document; 0 where there is none
    weights: [B, T] float32, trained weight of that target; 0 at a document's last token and in padding
    cu_seqlens: [segments + 1] int32 over the B * T flattened tokens; a row's padding is a segment of its own
    max_seqlen: longest segment, in tokens
    rows: numbers of the rows in it, as the mix numbers them; empty slots are left out
    documents: numbers of the documents in it, in order of place
    tokens: real tokens, padding not counted
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    rows: list[int]
    documents: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One rank's share of a global batch.

    micro: this rank's micro-batches; every rank has the same number
    weight: sum of the trained weights of the whole global batch, the loss's denominator
    tokens: real tokens of the whole global batch
    source_tokens: of them, those of each source
    cost: sum of the squared segment lengths of the whole global batch
    rows: [rows] int64, the whole global batch
    """

    micro: list[MicroBatch]
    weight: float
    tokens: int
    source_tokens: tuple[int, ...]
    cost: float
    rows: NDArray[np.int64]


class Batches:
    """The global batches of a run as one rank sees them; any step at the same cost, so a resume needs only its number.

    Args:
        mix: the sources; a store alone is a mix of one.
        micro_batch_size: rows in one forward on one rank.
        total_steps: optimizer steps of the run.
        total_rows: rows of the run, when epochs end inside a batch; None: every batch is full.
        layout: `packed` lays rows as the store packed them; `documents` gives each of their documents a row of its own.
        pad_to: tokens of every row; None: the longest of the micro-batch, rounded up to a multiple of 8.
    """

    def __init__(
        self,
        mix: Mix | Store,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        total_steps: int,
        total_rows: int | None = None,
        layout: Literal["packed", "documents"] = "packed",
        pad_to: int | None = None,
    ) -> None:
        self.mix = mix if isinstance(mix, Mix) else Mix.of([mix])
        self.total_steps = total_steps
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._world_size = world_size
        self._rank = rank
        self._total_rows = total_rows
        self._layout = layout
        self._pad_to = pad_to

    def step(self, step: int) -> StepBatch:
        """This rank's part of optimizer step number `step`, from 0.

        Raises:
            IndexError: the run has fewer steps.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps} steps")
        mix = self.mix
        rows = mix.global_batch(
            step, seed=self._seed, global_batch_size=self._global_batch_size, total_rows=self._total_rows
        )
        units, costs, slots = self._units(rows)
        mine = deal(costs, ranks=self._world_size, slots_per_rank=slots)[self._rank]
        micro = [
            _lay(mix, [units(i) if i >= 0 else None for i in chunk], pad_to=self._pad_to)
            for chunk in mine.reshape(-1, self._micro_batch_size).tolist()
        ]
        of_sources = tuple(mix.tokens_of_sources(rows).tolist())
        weight, cost = float(mix.row_weight[rows].sum()), float(mix.row_cost[rows].sum())
        return StepBatch(micro, weight, sum(of_sources), of_sources, cost, rows)

    def _units(self, rows: NDArray[np.int64]) -> tuple[Callable[[int], _Unit], NDArray[np.int64], int]:
        """What is dealt to ranks: the i-th unit, read only when asked for; the cost of each; slots on each rank."""
        mix = self.mix
        if self._layout == "packed":
            slots = self._slots(self._global_batch_size)
            return lambda i: (int(rows[i]), mix.row_documents(int(rows[i]))), mix.row_cost[rows], slots
        units = [(int(row), np.array([d])) for row in rows for d in mix.row_documents(int(row))]
        costs = mix.document_lengths(np.array([int(d[0]) for _, d in units], dtype=np.int64)) ** 2
        return units.__getitem__, costs, self._slots(len(units))

    def _slots(self, units: int) -> int:
        per_forward = self._world_size * self._micro_batch_size
        return -(-units // per_forward) * self._micro_batch_size


def eval_batches(
    store: Store, *, micro_batch_size: int, world_size: int, rank: int, pad_to: int | None = None
) -> Iterator[MicroBatch]:
    """Every row of a store once over all ranks, in store order; the same number of micro-batches on each rank."""
    per_forward = micro_batch_size * world_size
    for first in range(0, store.rows, per_forward):
        begin = first + rank * micro_batch_size
        rows = [row if row < store.rows else -1 for row in range(begin, begin + micro_batch_size)]
        yield _lay(store, [(row, store.row_documents(row)) if row >= 0 else None for row in rows], pad_to=pad_to)


def _lay(store: Mix | Store, slots: list[_Unit | None], *, pad_to: int | None) -> MicroBatch:
    """Documents into arrays; a slot of None becomes a row of padding, weight 0."""
    loaded = [[store.document(int(d)) for d in slot[1]] if slot else [] for slot in slots]
    longest = max(sum(len(d.tokens) for d in documents) for documents in loaded)
    width = pad_to if pad_to and pad_to >= longest else -(-max(longest, 1) // _MULTIPLE) * _MULTIPLE
    shape = (len(slots), width)
    ids, positions, targets = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    weights = np.zeros(shape, dtype=np.float32)
    borders = [0]
    for row, documents in enumerate(loaded):
        at = 0
        for document in documents:
            end = at + len(document.tokens)
            ids[row, at:end] = document.tokens
            positions[row, at:end] = np.arange(end - at)
            targets[row, at : end - 1] = document.tokens[1:]
            weights[row, at : end - 1] = document.weights[1:]
            borders.append(row * width + end)
            at = end
        if at < width:
            positions[row, at:] = np.arange(width - at)
            borders.append((row + 1) * width)
    return MicroBatch(
        input_ids=ids,
        position_ids=positions,
        targets=targets,
        weights=weights,
        cu_seqlens=np.array(borders, dtype=np.int32),
        max_seqlen=int(np.diff(borders).max()),
        rows=[slot[0] for slot in slots if slot],
        documents=[int(d) for slot in slots if slot for d in slot[1]],
        tokens=sum(len(d.tokens) for documents in loaded for d in documents),
    )
