"""Which documents share a row: exact best-fit-decreasing over the whole set, in linear time.

Documents are taken from the longest to the shortest (counting sort); each goes into the fullest row it still fits,
found in a bitset over the free space that rows have left. Of rows equally full, the one filled last is taken, so the
result is fixed.

Reference: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830 (finds the row in a tree).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INTERPRETED = 200_000  # up to so many documents (0.3 s) the same function runs uncompiled: quicker than the compiler

_BIT = np.zeros(37, dtype=np.int64)  # 2**k modulo the prime 37 differs for each k below 36, so it finds k
_BIT[[2**k % 37 for k in range(32)]] = range(32)


def pack(lengths: NDArray[Any], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay documents into as few rows as best-fit-decreasing finds.

    Args:
        lengths: [documents] tokens of each, 1 to `capacity`.
        capacity: tokens of a row.
    Returns:
        offsets: [rows + 1] int64, where each row begins in `order`.
        order: [documents] int64, document numbers of all rows laid end to end.
    Raises:
        ValueError: a length outside 1 to `capacity`.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, expected 1 to {capacity}")
    assign = _best_fit if lengths.size <= _INTERPRETED else _compiled()
    rows, row_of = assign(lengths, _longest_first(lengths), capacity)
    return _group(row_of, rows)


def lower_bound(lengths: NDArray[Any], capacity: int) -> int:
    """Rows that no packing can go below: all tokens, were there no waste."""
    return int(-(-int(np.sum(lengths, dtype=np.int64)) // capacity))


def one_a_row(documents: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`packing: none` in the shape of `pack`."""
    return np.arange(documents + 1, dtype=np.int64), np.arange(documents, dtype=np.int64)


@cache
def _compiled() -> Callable[..., tuple[int, NDArray[np.int64]]]:
    import numba

    compiled: Callable[..., tuple[int, NDArray[np.int64]]]
    try:
        compiled = numba.njit(cache=True)(_best_fit)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compile in every process, 2 s
        compiled = numba.njit(_best_fit)
    return compiled


def _longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Document numbers by length, longest first, ties by number."""
    if lengths.size and lengths.max() < 2**16:  # a stable sort of 16-bit numbers is a counting (radix) sort
        return np.argsort((np.uint16(65535) - lengths.astype(np.uint16)), kind="stable")
    return np.argsort(-lengths, kind="stable")


def _group(row_of: NDArray[np.int64], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents by row, ascending number inside a row."""
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    return offsets, np.argsort(row_of, kind="stable")


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
