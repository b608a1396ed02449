"""How several sources share an epoch: how many rows of each, which comes when, and the stores behind them as one.

All of it is arithmetic: from a position in the run to a source and a row of it, at the same cost anywhere. The rows of
a source come in the order that its own count of draws gives, so another source beside it changes when they come, never
in which order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import batch_positions, permute
from launcher.data.store import Document, Store, gather

_EXACT = 2**31  # products of two numbers below it fit int64; beyond, Python's own integers count


@dataclass(frozen=True, slots=True)
class Size:
    """What one source holds."""

    rows: int
    tokens: int
    documents: int


def shares(
    sizes: Sequence[Size], weights: Sequence[float | None], *, by: str = "tokens", temperature: float = 1.0
) -> list[float]:
    """Each source's share of an epoch, in the unit `by`; without weights, as large as it is.

    Args:
        weights: one of each source; all None or none of them.
        by: tokens, rows or documents.
        temperature: weights are raised to 1 / temperature, so above 1 the shares come closer to each other.
    """
    raw = [getattr(size, by) if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    largest = max(raw)  # before the power, which a small temperature makes large
    powers = [(value / largest) ** (1.0 / temperature) for value in raw]
    return [power / sum(powers) for power in powers]


def epoch_rows(
    sizes: Sequence[Size],
    shares: Sequence[float],
    *,
    by: str = "tokens",
    until: Literal["total", "first", "last"] = "total",
) -> list[int]:
    """Rows of each source in one epoch; the nearest whole numbers to the shares, and no source without a row.

    Args:
        shares: as the function of that name gives them.
        until: an epoch holds as much (in the unit `by`) as all sources together, or ends when the first or the last of
            them has been seen once.
    """
    held = [getattr(size, by) for size in sizes]
    alone = [amount / share for amount, share in zip(held, shares, strict=True) if share]  # epochs that see one once
    amount = {"total": float(sum(held)), "first": min(alone), "last": max(alone)}[until]
    return [
        max(1, round(share * amount * size.rows / one))
        for share, size, one in zip(shares, sizes, held, strict=True)
    ]  # fmt: skip


def interleave(
    position: NDArray[np.int64], draws: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Which source has its turn at a position of an epoch, and how many turns it had before in that epoch.

    The first source is spread evenly over the epoch (Bresenham's line), the second evenly over what is left, and so on.

    Args:
        position: [n] int64, each in range(sum(draws)).
        draws: turns of each source in an epoch.
    Returns:
        [n] int64 each: the source, and its turns before.

    Reference: Bresenham, Algorithm for computer control of a digital plotter, IBM Systems Journal 4(1), 1965.
    """
    source = np.full(position.size, len(draws) - 1, dtype=np.int64)
    turn = np.empty(position.size, dtype=np.int64)
    left, at, total = np.arange(position.size), position, sum(draws)
    for number, mine in enumerate(draws[:-1]):
        before, after = _drawn(at, mine, total), _drawn(at + 1, mine, total)
        now = after > before
        source[left[now]], turn[left[now]] = number, before[now]
        left, at, total = left[~now], (at - before)[~now], total - mine
    turn[left] = at
    return source, turn


def _drawn(position: NDArray[np.int64], draws: int, total: int) -> NDArray[np.int64]:
    """Turns among the first `position` of `total`: draws / total of them, rounded half up."""
    exact = position if total < _EXACT else position.astype(object)
    counted: NDArray[np.int64] = ((exact * draws + total // 2) // total).astype(np.int64)
    return counted


class Mix:
    """The stores of all training sources as one: rows and documents numbered over all of them, and their order.

    A row's number also says in which packing of its source it lies, where `data.repack` made several.

    names: of the sources
    draws: rows of each source in an epoch
    rows: rows of an epoch
    isolate: whether documents of a row see nothing of one another
    row_tokens, row_cost, row_weight: as in `Store`, indexed by numbers of rows
    """

    def __init__(self, stores: Sequence[Store], draws: Sequence[int], names: Sequence[str]) -> None:
        self.stores, self.draws, self.names = list(stores), list(draws), list(names)
        self.rows = sum(draws)
        self.isolate = all(store.isolate for store in stores)
        self._packings = [store.packings for store in stores]
        self._views = [store.packing(k) for store in stores for k in range(store.packings)]
        self._of_view = np.repeat(np.arange(len(stores)), self._packings)
        self._first_view = np.cumsum([0, *self._packings[:-1]])
        self._first_row = np.cumsum([0, *(view.rows for view in self._views)])
        self._first_document = np.cumsum([0, *(store.num_documents for store in stores)])
        self.row_tokens = _Column([view.row_tokens for view in self._views], self._first_row)
        self.row_cost = _Column([view.row_cost for view in self._views], self._first_row)
        self.row_weight = _Column([view.row_weight for view in self._views], self._first_row)
        self._lengths = _Column([store.index.length for store in stores], self._first_document)
        self._sides = _Column([store.index.side for store in stores], self._first_document)

    @classmethod
    def of(cls, stores: Sequence[Store], draws: Sequence[int] | None = None, names: Sequence[str] = ()) -> Mix:
        """Stores that are open; without `draws` each is seen once in an epoch."""
        return cls(stores, draws or [store.rows for store in stores], names or [str(i) for i in range(len(stores))])

    @classmethod
    def open(cls, train: Mapping[str, Any]) -> Mix:
        """What the entry `train` of data.json names.

        Raises:
            UserError: a store is missing.
        """
        sources = train["sources"]
        stores = [Store.open(Path(source["store"])) for source in sources]
        return cls.of(stores, [source["epoch_rows"] for source in sources], [source["name"] for source in sources])

    def global_batch(
        self, step: int, *, seed: int, global_batch_size: int, total_rows: int | None = None
    ) -> NDArray[np.int64]:
        """Rows of a step's global batch, over all ranks; see `batch_positions`."""
        return self.at(
            batch_positions(step, global_batch_size=global_batch_size, total_rows=total_rows), seed=seed
        )  # fmt: skip

    def at(self, position: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
        """Numbers of the rows at these positions of the run; epochs are joined end to end.

        The k-th row that is drawn of a source over all epochs is row k of its own endless order: one keyed permutation
        of its rows after the other.
        """
        epoch, at = np.divmod(position, self.rows)
        source, turn = interleave(at, self.draws)
        rows = np.empty(position.size, dtype=np.int64)
        for number in np.unique(source).tolist():
            here = source == number
            size = self.stores[number].rows
            rounds, k = np.divmod(epoch[here] * self.draws[number] + turn[here], size)
            view = self._first_view[number] + rounds % self._packings[number]
            rows[here] = self._first_row[view] + permute(k, size, seed=seed, epoch=rounds)
        return rows

    def source_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the source of each row."""
        found: NDArray[np.int64] = self._of_view[_part(self._first_row, rows)]
        return found

    def tokens_of_sources(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[sources] tokens that these rows hold of each source."""
        tokens = np.bincount(self.source_of(rows), weights=self.row_tokens[rows], minlength=len(self.stores))
        return tokens.astype(np.int64)

    def row_documents(self, row: int) -> NDArray[np.int64]:
        """Numbers of the documents of a row, in the order they lie in it."""
        view = int(_part(self._first_row, row))
        ids = self._views[view].row_documents(row - int(self._first_row[view]))
        return ids + self._first_document[self._of_view[view]]

    def document_lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each document."""
        lengths: NDArray[np.int64] = self._lengths[documents].astype(np.int64)
        return lengths

    def document_sides(self, documents: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The `Side` of each document."""
        sides: NDArray[np.uint8] = self._sides[documents]
        return sides

    def document(self, document: int) -> Document:
        """One document's tokens and weights, and where it comes from."""
        store, own = self._own(document)
        return store.document(own)

    def documents(self, row: int) -> Iterator[Document]:
        """The documents of a row."""
        return (self.document(int(d)) for d in self.row_documents(row))

    def _own(self, document: int) -> tuple[Store, int]:
        source = int(_part(self._first_document, document))
        return self.stores[source], document - int(self._first_document[source])


class _Column:
    """One array of each store as if they were laid end to end; read by index, nothing is copied before."""

    def __init__(self, parts: list[NDArray[Any]], first: NDArray[np.int64]) -> None:
        self._parts, self._first = parts, first

    def __getitem__(self, index: NDArray[np.int64]) -> Any:
        if len(self._parts) == 1:
            return gather(self._parts[0], index)
        part = _part(self._first, index)
        values = np.empty(index.shape, dtype=self._parts[0].dtype)
        for number in np.unique(part).tolist():
            here = part == number
            values[here] = gather(self._parts[number], index[here] - self._first[number])
        return values


def _part(first: NDArray[np.int64], index: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """In which part each index lies; `first` holds where each begins, and the end."""
    return np.asarray(np.searchsorted(first, index, side="right") - 1)
