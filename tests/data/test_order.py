"""Row order is a pure function of (seed, epoch, position), and rows are dealt to ranks by cost."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import deal, global_batch_rows, keyed_order, permute, uniform_hash


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_of_all_rows(size, seed, epoch):
    order = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_orders_of_two_epochs_and_of_two_seeds_differ():
    def order(seed, epoch):
        return permute(np.arange(1000), 1000, seed=seed, epoch=epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)


def test_places_are_spread_evenly():
    places = permute(np.zeros(5000, np.int64), 10, seed=3, epoch=np.arange(5000))
    counts = np.bincount(places, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 40  # chi-squared, 9 degrees of freedom: 40 is a chance of 1e-5


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 200), batch=st.integers(1, 300), steps=st.integers(1, 6), seed=st.integers(0, 1000))
def test_batches_join_epochs_end_to_end_and_every_epoch_sees_each_row_once(rows, batch, steps, seed):
    seen = np.concatenate([global_batch_rows(rows, seed=seed, step=s, global_batch_size=batch) for s in range(steps)])
    assert len(seen) == batch * steps
    for epoch in range(len(seen) // rows):
        assert np.array_equal(np.sort(seen[epoch * rows : (epoch + 1) * rows]), np.arange(rows))


def test_only_the_last_batch_of_a_run_is_short():
    sizes = [len(global_batch_rows(10, seed=0, step=s, global_batch_size=8, total_rows=25)) for s in range(5)]
    assert sizes == [8, 8, 8, 1, 0]


def test_l6_step_a_million_costs_what_step_one_costs():
    def cost(step):
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            global_batch_rows(123_457, seed=7, step=step, global_batch_size=512)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    cost(0)
    assert cost(10**6) <= 5 * cost(1)


deals = st.fixed_dictionaries(
    {
        "ranks": st.integers(1, 9),
        "micro_batch_size": st.integers(1, 4),
        "slots": st.integers(1, 5),
        "lockstep": st.booleans(),
        "by_length": st.booleans(),
    }
)


def places(how):
    return how["ranks"] * how["micro_batch_size"] * how["slots"]


@settings(max_examples=200, deadline=None)
@given(how=deals, filled=st.floats(0, 1), seed=st.integers(0, 99))
def test_deal_gives_every_row_once_and_leaves_as_many_places_empty_as_there_are_too_many(how, filled, seed):
    tokens = np.random.default_rng(seed).integers(1, 1000, int(filled * places(how)))
    dealt = deal(tokens, tokens**2, **how)
    assert dealt.shape == (how["ranks"], how["slots"], how["micro_batch_size"])
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(tokens.size))


@pytest.mark.parametrize(("lockstep", "by_length"), [(True, False), (False, False), (True, True)])
def test_fewer_rows_than_ranks_go_to_as_many_ranks(lockstep, by_length):
    tokens = np.array([5, 9, 7])
    dealt = deal(tokens, tokens**2, ranks=4, slots=1, micro_batch_size=2, lockstep=lockstep, by_length=by_length)
    assert sorted((dealt >= 0).sum(axis=(1, 2)).tolist()) == [0, 1, 1, 1]


def long_rows(rows, seed):
    """Full rows of 32,768 tokens whose documents are of very different lengths."""
    squares = np.random.default_rng(seed).lognormal(np.log(32768**2 / 8), 1, rows).clip(1e6, 32768**2)
    return np.full(rows, 32768), squares.astype(np.int64)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_slots_and_sums_of_ranks_are_level(micro_batch_size):
    tokens, squares = long_rows(256, seed=0)
    cost = (45e9, 786432.0)
    price = cost[0] * tokens + cost[1] * squares

    def efficiencies(lockstep):
        how = {"ranks": 16, "slots": 16 // micro_batch_size, "micro_batch_size": micro_batch_size}
        load = price[deal(tokens, squares, cost=cost, lockstep=lockstep, **how)].sum(axis=2)
        mean = price.sum() / 16
        return mean / load.sum(axis=1).max(), mean / load.max(axis=0).sum()

    (sums, slots), (free_sums, _) = efficiencies(True), efficiencies(False)
    arrival = price.reshape(16, 16)
    assert sums > 0.99 > price.sum() / 16 / arrival.sum(axis=1).max()
    assert slots > 0.97 > price.sum() / 16 / arrival.max(axis=0).sum()
    assert free_sums > 0.999


def test_exchanges_level_what_one_pass_cannot():
    squares = np.array([40, 9, 9, 9, 9, 9, 9, 1, 1, 1, 1, 1])
    costs = squares[deal(squares, squares, cost=(0, 1), ranks=3, slots=4, micro_batch_size=1, lockstep=False)[:, :, 0]]
    assert costs.sum(axis=1).max() == 43  # the dear row with three of the cheapest


def test_rows_of_like_length_share_a_micro_batch():
    tokens = np.random.default_rng(0).permutation(np.repeat([10, 200, 3000], 16))
    dealt = deal(tokens, tokens**2, ranks=4, slots=3, micro_batch_size=4, by_length=True)
    assert all(len(set(tokens[micro].tolist())) == 1 for rank in dealt for micro in rank)
    assert len({tuple(sorted(tokens[rank].sum(axis=1).tolist())) for rank in dealt}) == 1


def test_dealing_65536_rows_to_16384_ranks_is_no_loop_over_rows(monkeypatch):
    calls = []
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *args, **kwargs: calls.append(1) or argsort(*args, **kwargs))
    tokens, squares = long_rows(65_536, seed=1)
    deal(tokens, squares, ranks=16_384, slots=4, micro_batch_size=1)
    assert len(calls) < 100


def test_deal_refuses_more_rows_than_places():
    with pytest.raises(ValueError, match="5 rows do not fit 2 ranks x 1 slots x 2 rows"):
        deal(np.ones(5, np.int64), np.ones(5, np.int64), ranks=2, slots=1, micro_batch_size=2)


def test_the_order_of_records_is_fixed_by_their_contents_and_keeps_copies_apart():
    hashes = np.random.default_rng(0).integers(0, 2**63, 500, dtype=np.uint64)
    hashes[100:120] = hashes[0]
    moved = np.random.default_rng(1).permutation(500)
    order = keyed_order(hashes)
    assert sorted(order.tolist()) == list(range(500))
    assert np.array_equal(hashes[order], hashes[moved][keyed_order(hashes[moved])])
    copies = np.flatnonzero(hashes[order] == hashes[0])
    assert (np.diff(copies) > 1).sum() > 15
    assert keyed_order(hashes[:0]).size == 0


def test_uniform_hash_is_stable_and_spreads():
    numbers = uniform_hash(3, 0, np.arange(20_000))
    assert np.array_equal(numbers[:100], uniform_hash(3, 0, np.arange(100)))
    assert abs((numbers < 0.1).mean() - 0.1) < 0.01
    assert not np.array_equal(numbers, uniform_hash(4, 0, np.arange(20_000)))
