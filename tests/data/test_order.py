"""Row order is a pure function of (seed, epoch, position), and rows are dealt to ranks by cost."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.order import deal, global_batch_rows, permute, uniform_hash


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
    places = np.array([permute(np.array([0]), 10, seed=seed, epoch=0)[0] for seed in range(5000)])
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


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(0, 10**9), min_size=0, max_size=64), ranks=st.integers(1, 9), extra=st.integers(0, 3))
def test_deal_gives_every_row_once_and_keeps_to_the_slots(costs, ranks, extra):
    slots = -(-len(costs) // ranks) + extra
    dealt = deal(np.array(costs, dtype=np.int64), ranks=ranks, slots_per_rank=slots)
    assert dealt.shape == (ranks, slots)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(len(costs)))
    for rank in dealt.tolist():
        filled = [row for row in rank if row >= 0]
        assert rank == filled + [-1] * (slots - len(filled))
        assert [costs[row] for row in filled] == sorted((costs[row] for row in filled), reverse=True)


def test_deal_balances_cost_better_than_the_order_of_arrival():
    costs = np.random.default_rng(0).lognormal(10, 1, 256).astype(np.int64)
    loads = costs[deal(costs, ranks=16, slots_per_rank=16)].sum(axis=1)
    naive = costs.reshape(16, 16).sum(axis=1)
    assert loads.mean() / loads.max() > 0.95 > naive.mean() / naive.max()


def test_deal_refuses_more_rows_than_slots():
    with pytest.raises(ValueError, match="5 rows do not fit 2 ranks x 2 slots"):
        deal(np.ones(5, np.int64), ranks=2, slots_per_rank=2)


def test_uniform_hash_is_stable_and_spreads():
    numbers = uniform_hash(3, 0, np.arange(20_000))
    assert np.array_equal(numbers[:100], uniform_hash(3, 0, np.arange(100)))
    assert abs((numbers < 0.1).mean() - 0.1) < 0.01
    assert not np.array_equal(numbers, uniform_hash(4, 0, np.arange(20_000)))
