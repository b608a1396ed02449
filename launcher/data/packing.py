"""Which documents share a row: best-fit-decreasing over the whole set in linear time, or end to end and cut.

Best fit takes documents from the longest to the shortest (counting sort); each goes into the fullest row it still fits,
found in a bitset over the free space that rows have left. Of rows equally full, the one filled last is taken, so the
result is fixed.

Reference: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830 (finds the row in a tree).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import uniform_hash

Packing = tuple[NDArray[np.int64], NDArray[np.int64]]  # where each row begins in the second; documents of all rows

_INTERPRETED = 100_000  # up to so many documents (0.3 s) the same function runs uncompiled: quicker than the compiler

_BIT = np.zeros(37, dtype=np.int64)  # 2**k modulo the prime 37 differs for each k below 36, so it finds k
_BIT[[2**k % 37 for k in range(32)]] = range(32)


def pack(lengths: NDArray[Any], capacity: int, *, order: NDArray[np.int64] | None = None) -> Packing:
    """Lay documents into as few rows as best-fit-decreasing finds.

    Args:
        lengths: [documents] tokens of each, 1 to `capacity`.
        capacity: tokens of a row.
        order: [documents] int64, in which they are taken; None: from the longest to the shortest.
    Returns:
        offsets: [rows + 1] int64, where each row begins in `order`.
        order: [documents] int64, document numbers of all rows laid end to end.
    Raises:
        ValueError: a length outside 1 to `capacity`.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, expected 1 to {capacity}")
    order = _longest_first(lengths) if order is None else order
    few = lengths.size <= _INTERPRETED
    rows, row_of = (_best_fit if few else _compiled(_best_fit))(lengths, order, capacity)
    return _by_row(row_of, rows) if few else _compiled(_counted_by_row)(row_of, rows)


def repack(lengths: NDArray[Any], capacity: int, *, times: int, seed: int) -> list[Packing]:
    """The same documents packed several times, so that other ones meet in a row; as many rows each time.

    The first is `pack`. The others take documents of about the same length, within an eighth of a power of two, in an
    order that is drawn from (seed, number of the packing, document); where one needs fewer rows, some are cut in two.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    packings = [pack(lengths, capacity)]
    for number in range(1, times):
        drawn = uniform_hash(seed, number, np.arange(lengths.size))
        order = np.lexsort((drawn, -_length_class(lengths)))
        packings.append(pack(lengths, capacity, order=order))
    most = max(offsets.size for offsets, _ in packings) - 1
    return [(_cut_rows(offsets, most), order) for offsets, order in packings]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Documents laid end to end and cut into rows.

    document: [pieces] int64, which document each is of
    start: [pieces] int64, its first token in that document
    length: [pieces] int64, tokens
    offsets: [rows + 1] int64, where each row begins among the pieces
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    offsets: NDArray[np.int64]


def end_to_end(lengths: NDArray[Any], capacity: int, order: NDArray[np.int64]) -> Pieces:
    """Lay documents one after the other and cut after every `capacity` tokens; the last row is as long as it comes out.

    A last row of a single token, which follows nothing, takes one from the row before it.
    """
    taken = np.asarray(lengths, dtype=np.int64)[order]
    ends = np.cumsum(taken)
    total = int(ends[-1]) if ends.size else 0
    starts = ends - taken
    rows = np.arange(0, total, capacity, dtype=np.int64)
    if rows.size > 1 and capacity > 2 and total - rows[-1] == 1:
        rows[-1] -= 1
    begins = np.unique(np.concatenate([starts, rows]))
    which = np.searchsorted(starts, begins, side="right") - 1
    return Pieces(
        document=order[which],
        start=begins - starts[which],
        length=np.diff(begins, append=total),
        offsets=np.append(np.searchsorted(begins, rows), begins.size),
    )


def lower_bound(lengths: NDArray[Any], capacity: int) -> int:
    """Rows that no packing can go below: all tokens, were there no waste."""
    return int(-(-int(np.sum(lengths, dtype=np.int64)) // capacity))


def one_a_row(documents: int) -> Packing:
    """`packing: none` in the shape of `pack`."""
    return np.arange(documents + 1, dtype=np.int64), np.arange(documents, dtype=np.int64)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compile in every process, 2 s
        compiled = numba.njit(function)
    return compiled


def _longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Document numbers by length, longest first, ties by number."""
    if lengths.size and lengths.max() < 2**16:  # a stable sort of 16-bit numbers is a counting (radix) sort
        return np.argsort((np.uint16(65535) - lengths.astype(np.uint16)), kind="stable")
    return np.argsort(-lengths, kind="stable")


def _length_class(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths in classes whose width is an eighth of the power of two below them; larger ones are longer."""
    mantissa, exponent = np.frexp(lengths.astype(np.float64))
    return exponent.astype(np.int64) * 8 + np.floor(mantissa * 16).astype(np.int64)


def _cut_rows(offsets: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Cut those that hold most documents in two until there are so many rows; no row becomes empty."""
    while (missing := rows - (offsets.size - 1)) > 0:
        held = np.diff(offsets)
        fullest = np.argsort(-held, kind="stable")[:missing]
        fullest = fullest[held[fullest] > 1]
        offsets = np.sort(np.concatenate([offsets, offsets[fullest] + held[fullest] // 2]))
    return offsets


def _by_row(row_of: NDArray[np.int64], rows: int) -> Packing:
    """Documents by row, ascending number inside a row."""
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    return offsets, np.argsort(row_of, kind="stable")


def _counted_by_row(row_of: NDArray[np.int64], rows: int) -> Packing:
    """The same as a counting sort, to be compiled."""
    offsets = np.zeros(rows + 1, dtype=np.int64)
    for document in range(row_of.size):
        offsets[row_of[document] + 1] += 1
    for row in range(rows):
        offsets[row + 1] += offsets[row]
    place = offsets[:-1].copy()
    order = np.empty(row_of.size, dtype=np.int64)
    for document in range(row_of.size):
        row = row_of[document]
        order[place[row]] = document
        place[row] += 1
    return offsets, order


def _best_fit(lengths: NDArray[np.int64], order: NDArray[np.int64], capacity: int) -> tuple[int, NDArray[np.int64]]:
    """Row of each document. Plain loops over integers: compiled by numba for many documents, run as it is for few.

    Rows with the same free space form a stack (`head`, `below`). Bit r of `words` says that the stack of free space r
    holds a row; bit w of `blocks` that word w is not 0. Words have 32 bits, so that no sign gets in the way.
    """
    row_of = np.empty(lengths.size, dtype=np.int64)
    below = np.empty(lengths.size, dtype=np.int64)
    head = np.full(capacity + 1, -1, dtype=np.int64)
    words = np.zeros((capacity >> 5) + 1, dtype=np.int64)
    blocks = np.zeros((capacity >> 10) + 1, dtype=np.int64)
    rows = 0
    for i in range(order.size):
        document = order[i]
        length = lengths[document]
        # the smallest free space >= length: rest of this word, else next word in this block, else next block
        at = length >> 5
        bits = words[at] >> (length & 31) << (length & 31)
        if bits == 0:
            block = (at + 1) >> 5
            found = 0
            if block < blocks.size:
                found = blocks[block] >> ((at + 1) & 31) << ((at + 1) & 31)
            while found == 0 and block + 1 < blocks.size:
                block += 1
                found = blocks[block]
            if found != 0:
                at = (block << 5) + _BIT[(found & -found) % 37]
                bits = words[at]
        if bits != 0:
            free = (at << 5) + _BIT[(bits & -bits) % 37]
            row = head[free]
            head[free] = below[row]
            if head[free] < 0:
                words[free >> 5] &= ~(1 << (free & 31))
                if words[free >> 5] == 0:
                    blocks[free >> 10] &= ~(1 << ((free >> 5) & 31))
        else:
            row = rows
            rows += 1
            free = capacity
        row_of[document] = row
        rest = free - length
        if rest > 0:
            below[row] = head[rest]
            head[rest] = row
            words[rest >> 5] |= 1 << (rest & 31)
            blocks[rest >> 10] |= 1 << ((rest >> 5) & 31)
    return rows, row_of
