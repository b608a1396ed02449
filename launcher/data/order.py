"""Which rows form a step's global batch and who gets which: pure functions of (seed, step), no stored shuffle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# (a, b) of a block that is 4,096 wide, where nothing is known of the model: a token meets 12 x width^2 weights in it
# and, in attention, width of each token before it; times 6 both
USUAL_COST = (12.0 * 4096, 1.0)

_ROUNDS = 8
_PASSES = 8  # of levelling; the third seldom changes anything
_ROUNDS_OF_EXCHANGE = 64
_PATIENCE = 8  # rounds without a gain, each with other pairs
_ENOUGH = 1e-4  # relative difference that nobody notices
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


def deal(
    tokens: NDArray[np.int64],
    squares: NDArray[np.int64],
    *,
    ranks: int,
    micro_batch_size: int,
    slots: int,
    cost: tuple[float, float] = USUAL_COST,
    lockstep: bool = True,
    by_length: bool = False,
) -> NDArray[np.int64]:
    """Give the rows of one global batch to ranks and to their micro-batches so that nobody waits for long.

    A row costs a * tokens + b * squares. Where ranks meet at every micro-batch (`lockstep`), rows of about equal cost
    are dealt into the same slot, and then micro-batches to ranks so that each rank's sum is level, too. Where they meet
    once a step, only the sums count: rows are exchanged between the dearest and the cheapest ranks.

    Args:
        tokens: [rows] of each row.
        squares: [rows] sum of the squared lengths of its segments.
        slots: micro-batches of each rank.
        cost: (a, b).
        by_length: rows of about equal length share a micro-batch, as they are padded to the longest of it.
    Returns:
        [ranks, slots, micro_batch_size] int64, indices of rows; -1 is an empty place.
    Raises:
        ValueError: more rows than places.
    """
    places = ranks * slots * micro_batch_size
    if len(tokens) > places:
        raise ValueError(f"{len(tokens)} rows do not fit {ranks} ranks x {slots} slots x {micro_batch_size} rows")
    price = np.append(cost[0] * tokens.astype(np.float64) + cost[1] * squares.astype(np.float64), 0.0)  # [-1]: no row
    if by_length:
        together = _of_like_length(tokens, ranks=ranks, slots=slots, micro_batch_size=micro_batch_size)
        padded = np.append(tokens, 0)[together].max(axis=-1) * (cost[0] * micro_batch_size)
        prices = padded + cost[1] * np.append(squares, 0)[together].sum(axis=-1)
    else:
        dearest = np.full(places, -1, dtype=np.int64)
        dearest[: len(tokens)] = np.argsort(-price[:-1], kind="stable")
        if not lockstep:
            dealt = _exchanged(dearest.reshape(-1, ranks), price).T
            return dealt.reshape(ranks, slots, micro_batch_size)
        ways = _of_like_cost(dearest, price, (slots, ranks, micro_batch_size))
        together = min(ways, key=lambda way: price[way].sum(axis=-1).max(axis=1).sum())
        prices = price[together].sum(axis=-1)
    if not lockstep:
        chunks = np.append(np.argsort(-prices.ravel(), kind="stable"), -1)[:-1].reshape(slots, ranks)
        chosen = _exchanged(chunks, np.append(prices.ravel(), 0.0)).T
        return together.reshape(-1, micro_batch_size)[chosen]
    return np.take_along_axis(together, _level(prices)[:, :, None], axis=1).swapaxes(0, 1)


def _of_like_length(
    tokens: NDArray[np.int64], *, ranks: int, slots: int, micro_batch_size: int
) -> NDArray[np.int64]:  # fmt: skip
    """[slots, ranks, micro_batch_size] rows, the longest first; what a slot lacks is missing evenly, of the longest."""
    together = np.full((slots, ranks, micro_batch_size), -1, dtype=np.int64)
    longest, taken = np.argsort(-tokens, kind="stable"), 0
    for slot in range(slots):
        rows = min(len(tokens) - taken, ranks * micro_batch_size)
        counts = rows // ranks + (np.arange(ranks) >= ranks - rows % ranks)
        together[slot][np.arange(micro_batch_size) < counts[:, None]] = longest[taken : taken + rows]
        taken += rows
    return together


def _of_like_cost(
    dearest: NDArray[np.int64], price: NDArray[np.float64], shape: tuple[int, int, int]
) -> Iterator[NDArray[np.int64]]:
    """[slots, ranks, micro_batch_size] rows, in one or two ways of which now one, now the other is better.

    Rows of about equal cost in a slot, made level there; or micro-batches of about equal cost, the dearest in a slot.
    """
    slots, ranks, micro_batch_size = shape
    layers = dearest.reshape(slots, micro_batch_size, ranks)
    yield np.stack([np.take_along_axis(one, _level(price[one]), axis=1) for one in layers]).swapaxes(1, 2)
    if micro_batch_size > 1:
        micro = _exchanged(dearest.reshape(micro_batch_size, -1), price).T
        yield micro[np.argsort(-price[micro].sum(axis=1), kind="stable")].reshape(shape)


def _level(prices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where to take each layer's things from so that the sums over layers are about equal.

    Layer by layer, the dearest thing goes to where the other layers sum up to least, until that does not help further.

    Args:
        prices: [layers, bins]; every bin takes one thing of each layer.
    Returns:
        [layers, bins] int64, index into the layer.
    """
    layers, bins = prices.shape
    dearest = np.argsort(-prices, axis=1, kind="stable")
    place = np.tile(np.arange(bins), (layers, 1))
    sums, held = np.zeros(bins), np.zeros((layers, bins))
    best, best_place = np.inf, place
    for _ in range(_PASSES):
        for layer in range(layers):
            rest = sums - held[layer]
            cheapest = np.argsort(rest, kind="stable")
            place[layer, cheapest] = dearest[layer]
            held[layer] = prices[layer, place[layer]]
            sums = rest + held[layer]
        if sums.max() >= best * (1 - _ENOUGH):
            break
        best, best_place = sums.max(), place.copy()
        if best <= sums.mean() * (1 + _ENOUGH):
            break
    return best_place


def _exchanged(rows: NDArray[np.int64], price: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of each rank (a column), the dearest first, after exchanges that make the sums about equal.

    In each round the dearest rank is paired with the cheapest, the second with the second cheapest and so on; a pair
    exchanges those two rows that bring its sums closest.
    """
    rows = np.take_along_axis(rows, _level(price[rows]), axis=1)
    half, best, idle = rows.shape[1] // 2, np.inf, 0
    for _ in range(_ROUNDS_OF_EXCHANGE):
        prices = price[rows]
        sums = prices.sum(axis=0)
        idle = 0 if sums.max() < best * (1 - _ENOUGH) else idle + 1
        best = min(best, sums.max())
        if idle == _PATIENCE or best <= sums.mean() * (1 + _ENOUGH):
            break
        order = np.argsort(-sums, kind="stable")
        dear, cheap = order[:half], np.roll(order[::-1][:half], idle * (half // _PATIENCE + 1))
        wanted = (sums[dear] - sums[cheap]) / 2
        gain, mine, theirs = np.zeros(half), np.zeros(half, dtype=np.int64), np.zeros(half, dtype=np.int64)
        for layer in range(rows.shape[0]):
            moved = wanted - np.abs(prices[layer, dear] - prices[:, cheap] - wanted)  # above 0: the sums come closer
            other = moved.argmax(axis=0)
            better = (found := moved[other, np.arange(half)]) > gain
            gain[better], mine[better], theirs[better] = found[better], layer, other[better]
        swap = np.flatnonzero(gain > 0)
        here, there = (mine[swap], dear[swap]), (theirs[swap], cheap[swap])
        rows[here], rows[there] = rows[there], rows[here]
    return np.take_along_axis(rows, np.argsort(-price[rows], axis=0, kind="stable"), axis=0)


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
