"""What one rank feeds to the model: a step's rows dealt to ranks, cut into micro-batches, laid out as padded arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from launcher.data.mix import Mix
from launcher.data.order import USUAL_COST, deal
from launcher.data.store import Document, Store

_T = TypeVar("_T", bound=np.generic)
_MULTIPLE = 8  # row lengths that tensor cores like
_Unit = tuple[int, NDArray[np.int64]]  # row, and the documents of it that are laid


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward on one rank; B rows of T tokens.

    A segment is a document; where documents are not isolated, all of a row's tokens; or a row's padding.

    input_ids: [B, T] int64
    position_ids: [B, T] int64, restarts at 0 in every segment
    targets: [B, T] int64, the next token of the same segment; 0 where there is none
    weights: [B, T] float32, trained weight of that target; 0 at a segment's last token and in padding
    cu_seqlens: [segments + 1] int32 over the B * T flattened tokens
    max_seqlen: longest segment, in tokens
    rows: numbers of the rows in it, as the mix numbers them; empty slots are left out
    documents: numbers of the documents in it, in order of place
    tokens: real tokens, padding not counted
    sides: what each of the documents is to its record, a `Side` each
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
    sides: list[int] = field(default_factory=list)


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
        cost: (a, b), of which a row costs a * tokens + b * sum of the squared segment lengths.
        lockstep: ranks wait for each other at every micro-batch, not only at the end of a step.
        by_length: rows of like length share a micro-batch; for rows that are far from full.
    Raises:
        ValueError: documents that are not isolated have no row of their own.
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
        cost: tuple[float, float] = USUAL_COST,
        lockstep: bool = True,
        by_length: bool = False,
    ) -> None:
        self.mix = mix if isinstance(mix, Mix) else Mix.of([mix])
        if layout == "documents" and not self.mix.isolate:
            raise ValueError("documents that are not isolated have no row of their own")
        self.total_steps = total_steps
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._world_size = world_size
        self._rank = rank
        self._total_rows = total_rows
        self._layout = layout
        self._pad_to = pad_to
        self._cost, self._lockstep = cost, lockstep
        self._by_length = by_length or layout == "documents"

    def step(self, step: int) -> StepBatch:
        """This rank's part of optimizer step number `step`, from 0.

        Raises:
            IndexError: the run has fewer steps.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps} steps")
        mix, rows = self.mix, self.rows(step)
        units, tokens, squares = self._units(rows)
        per_forward = self._world_size * self._micro_batch_size
        most = self._global_batch_size if self._layout == "packed" else len(tokens)
        dealt = deal(
            tokens, squares, ranks=self._world_size, micro_batch_size=self._micro_batch_size,
            slots=-(-most // per_forward), cost=self._cost, lockstep=self._lockstep, by_length=self._by_length,
        )  # fmt: skip
        micro = [
            lay(mix, [units(i) if i >= 0 else None for i in chunk], pad_to=self._pad_to)
            for chunk in dealt[self._rank].tolist()
        ]
        of_sources = tuple(mix.tokens_of_sources(rows).tolist())
        weight, cost = float(mix.row_weight[rows].sum()), float(mix.row_cost[rows].sum())
        return StepBatch(micro, weight, sum(of_sources), of_sources, cost, rows)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Numbers of the rows of a step's global batch, over all ranks."""
        return self.mix.global_batch(
            step, seed=self._seed, global_batch_size=self._global_batch_size, total_rows=self._total_rows
        )

    def records(self, step: int) -> dict[str, list[int]]:
        """{source file: records of it} of all documents of a step's global batch."""
        found: dict[str, list[int]] = {}
        for document in (document for row in self.rows(step).tolist() for document in self.mix.documents(row)):
            found.setdefault(document.source, []).append(document.record)
        return {source: sorted(set(records)) for source, records in found.items()}

    def _units(self, rows: NDArray[np.int64]) -> tuple[Callable[[int], _Unit], NDArray[Any], NDArray[Any]]:
        """What is dealt to ranks: the i-th unit, read only when asked for; tokens and squared lengths of each."""
        mix = self.mix
        if self._layout == "packed":
            return lambda i: (int(rows[i]), mix.row_documents(int(rows[i]))), mix.row_tokens[rows], mix.row_cost[rows]
        units = [(int(row), np.array([d])) for row in rows for d in mix.row_documents(int(row))]
        lengths = mix.document_lengths(np.array([int(d[0]) for _, d in units], dtype=np.int64))
        return units.__getitem__, lengths, lengths**2


def eval_batches(
    store: Store, *, micro_batch_size: int, world_size: int, rank: int, pad_to: int | None = None
) -> Iterator[MicroBatch]:
    """Every row of a store once over all ranks, in store order; the same number of micro-batches on each rank."""
    per_forward = micro_batch_size * world_size
    for first in range(0, store.rows, per_forward):
        begin = first + rank * micro_batch_size
        rows = [row if row < store.rows else -1 for row in range(begin, begin + micro_batch_size)]
        yield lay(store, [(row, store.row_documents(row)) if row >= 0 else None for row in rows], pad_to=pad_to)


class Documents(Protocol):
    """Where documents are read from by number: a store, a mix, or what else has them."""

    @property
    def isolate(self) -> bool:
        """Whether documents of a row see nothing of one another."""
        ...

    def document(self, document: int, /) -> Document:
        """One document."""
        ...


def lay(source: Documents, slots: Sequence[_Unit | None], *, pad_to: int | None) -> MicroBatch:
    """Documents into arrays.

    Args:
        slots: (number of the row, numbers of its documents); None becomes a row of padding, weight 0.
        pad_to: tokens of every row; None: the longest, rounded up to a multiple of 8.
    """
    loaded = [[source.document(int(d)) for d in slot[1]] if slot else [] for slot in slots]
    lengths = [[len(d.tokens) for d in documents] for documents in loaded]
    longest = max(sum(row) for row in lengths)
    width = pad_to if pad_to and pad_to >= longest else -(-max(longest, 1) // _MULTIPLE) * _MULTIPLE
    ids, own = np.zeros((len(slots), width), dtype=np.int64), np.zeros((len(slots), width), dtype=np.float32)
    segments: list[int] = []
    for row, (documents, sizes) in enumerate(zip(loaded, lengths, strict=True)):
        if (filled := sum(sizes)) > 0:
            np.concatenate([d.tokens for d in documents], out=ids[row, :filled], casting="same_kind")
            np.concatenate([d.weights for d in documents], out=own[row, :filled])
        segments += sizes if source.isolate else [filled] * (filled > 0)
        segments += [width - filled] * (filled < width)
    ends = np.cumsum(segments)
    return MicroBatch(
        input_ids=ids,
        position_ids=(np.arange(ids.size) - np.repeat(ends - segments, segments)).reshape(ids.shape),
        targets=_next(ids, ends),
        weights=_next(own, ends),
        cu_seqlens=np.append(0, ends).astype(np.int32),
        max_seqlen=max(segments),
        rows=[slot[0] for slot in slots if slot],
        documents=[int(d) for slot in slots if slot for d in slot[1]],
        tokens=sum(sum(row) for row in lengths),
        sides=[int(d.side) for documents in loaded for d in documents],
    )


def _next(values: NDArray[_T], ends: NDArray[np.int64]) -> NDArray[_T]:
    """Each place's successor in its segment, 0 where there is none."""
    shifted = np.zeros_like(values)
    flat = shifted.reshape(-1)
    flat[:-1] = values.reshape(-1)[1:]
    flat[ends - 1] = 0
    return shifted
