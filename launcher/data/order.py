"""Which rows form a step's global batch and who gets which: pure functions of (seed, step), no stored shuffle."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MASK = (1 << 64) - 1


def global_batch_rows(
    num_rows: int, *, seed: int, step: int, global_batch_size: int, total_rows: int | None = None
) -> NDArray[np.int64]:
    """Rows of the step's global batch, over all ranks.

    Epochs are joined end to end, each with its own order; a batch may cross the border. Any step costs the same.

    Args:
        step: number of the optimizer step, from 0.
        total_rows: rows of the whole run; the last batch stops there. None: no end.
    Returns:
        [global_batch_size] int64, or fewer at the run's end.
    """
    position = batch_positions(step, global_batch_size=global_batch_size, total_rows=total_rows)
    return permute(position % num_rows, num_rows, seed=seed, epoch=position // num_rows)


def batch_positions(step: int, *, global_batch_size: int, total_rows: int | None = None) -> NDArray[np.int64]:
    """Positions of a step's rows in the run, whose epochs are joined end to end; arguments as above."""
    first = step * global_batch_size
    end = first + global_batch_size if total_rows is None else min(first + global_batch_size, total_rows)
    return np.arange(first, max(end, first), dtype=np.int64)


def permute(position: NDArray[np.int64], size: int, *, seed: int, epoch: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Where a keyed permutation of range(size) sends each position; one permutation a (seed, epoch).

    A Feistel network over the next power of four, walked until the value falls inside range(size).

    Args:
        position: [n] int64, each in range(size).
        epoch: [n] int64 or one number for all.
    Returns:
        [n] int64, each in range(size).

    Reference: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (Feistel, cycle walking).
    """
    half = max(3, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, np.broadcast_to(np.asarray(epoch, dtype=np.int64), position.shape))
    value = _feistel(position.astype(np.uint64), keys, half)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], keys[:, outside], half)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def deal(costs: NDArray[np.int64], *, ranks: int, slots_per_rank: int) -> NDArray[np.int64]:
    """Give the rows of one global batch to ranks so that the dearest rank is as cheap as possible: longest first.

    Args:
        costs: [rows] what each row costs, any unit.
    Returns:
        [ranks, slots_per_rank] int64 indices into `costs`, dearest first on each rank; -1 is an empty slot.
    Raises:
        ValueError: more rows than slots.
    """
    if len(costs) > ranks * slots_per_rank:
        raise ValueError(f"{len(costs)} rows do not fit {ranks} ranks x {slots_per_rank} slots")
    dealt = np.full((ranks, slots_per_rank), -1, dtype=np.int64)
    open_ranks = [(0, 0, rank) for rank in range(ranks)]  # (cost so far, rows so far, rank)
    for row in np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable").tolist():
        cost, rows, rank = heapq.heappop(open_ranks)
        dealt[rank, rows] = row
        if rows + 1 < slots_per_rank:
            heapq.heappush(open_ranks, (cost + int(costs[row]), rows + 1, rank))
    return dealt


def uniform_hash(seed: int, *parts: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """A number in [0, 1) for each combination of `parts`, fixed by the seed; for hold-outs and fixed subsets."""
    value = np.asarray(_mix_int(seed), dtype=np.uint64)
    for part in parts:
        value = _mix(value ^ _mix(np.asarray(part, dtype=np.int64).astype(np.uint64)))
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def keyed_order(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """An order of records that only their contents fix: what is shuffled by hash, copies of a record apart.

    Args:
        hashes: [records] of the content.
    Returns:
        [records] int64, which record comes when.
    """
    by_hash = np.argsort(hashes, kind="stable")
    same = np.append(False, np.diff(hashes[by_hash]) == 0) if hashes.size else np.zeros(0, dtype=bool)
    number = np.arange(hashes.size)
    copy = np.empty(hashes.size, dtype=np.uint64)
    copy[by_hash] = number - np.maximum.accumulate(np.where(same, 0, number))
    return np.argsort(_mix(hashes ^ _mix(copy)), kind="stable")


def _round_keys(seed: int, epoch: NDArray[np.int64]) -> NDArray[np.uint64]:
    base = _mix(epoch.astype(np.uint64) ^ np.uint64(_mix_int(seed)))
    return np.stack([_mix(base ^ np.uint64(_mix_int(i + 1))) for i in range(_ROUNDS)])


def _feistel(value: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits. Reference: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64 on purpose
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array(value & _MASK, dtype=np.uint64)))
