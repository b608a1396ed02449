"""Best-fit-decreasing is exact, deterministic, and the same compiled or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import packing
from launcher.data.packing import end_to_end, lower_bound, one_a_row, pack, repack

problems = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


def reference(lengths, capacity):
    """Rows as sets of documents, by looking at every row for every document."""
    rows, free, used_at = [], [], []
    for moment, document in enumerate(sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))):
        fits = [row for row in range(len(rows)) if free[row] >= lengths[document]]
        if fits:
            row = min(fits, key=lambda row: (free[row], -used_at[row]))
        else:
            row = len(rows)
            rows.append(set())
            free.append(capacity)
            used_at.append(moment)
        rows[row].add(document)
        free[row] -= lengths[document]
        used_at[row] = moment
    return rows


def rows_of(offsets, order):
    return [set(order[a:b].tolist()) for a, b in itertools.pairwise(offsets.tolist())]


@settings(max_examples=200, deadline=None)
@given(problems)
def test_rows_are_those_of_plain_best_fit_decreasing(problem):
    lengths, capacity = problem
    assert rows_of(*pack(np.array(lengths, dtype=np.int64), capacity)) == reference(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(problems)
def test_every_document_is_in_one_row_and_no_row_is_too_long(problem):
    lengths, capacity = problem
    offsets, order = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in row) <= capacity for row in rows_of(offsets, order))
    assert len(offsets) - 1 >= lower_bound(lengths, capacity)


@pytest.mark.parametrize("capacity", [31, 32, 33, 1023, 1024, 1025, 4096, 70_000])
def test_compiled_and_interpreted_packing_agree(capacity):
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 2000)
    order = packing._longest_first(lengths)
    rows, row_of = packing._best_fit(lengths, order, capacity)
    compiled_rows, compiled_row_of = packing._compiled(packing._best_fit)(lengths, order, capacity)
    assert rows == compiled_rows
    assert np.array_equal(row_of, compiled_row_of)


def test_forty_thousand_log_normal_lengths_fill_rows_to_within_half_a_permille():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(300), 1, 40_000), 1, 4096).astype(np.int64)
    offsets, order = pack(lengths, 4096)
    assert len(offsets) - 1 <= 1.0005 * lower_bound(lengths, 4096)
    again = pack(lengths, 4096)
    assert np.array_equal(offsets, again[0])
    assert np.array_equal(order, again[1])


def test_a_length_beyond_the_row_is_refused():
    with pytest.raises(ValueError, match="lengths from 3 to 9, expected 1 to 8"):
        pack(np.array([3, 9]), 8)


def test_no_packing_is_one_document_a_row():
    assert rows_of(*one_a_row(3)) == [{0}, {1}, {2}]
    assert rows_of(*pack(np.zeros(0, np.int64), 8)) == []


def test_compiled_and_interpreted_grouping_by_row_agree():
    row_of = np.random.default_rng(0).integers(0, 50, 500)
    row_of[:50] = np.arange(50)
    compiled = packing._compiled(packing._counted_by_row)(row_of, 50)
    assert all(np.array_equal(a, b) for a, b in zip(compiled, packing._by_row(row_of, 50), strict=True))


@settings(max_examples=60, deadline=None)
@given(problem=problems, times=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_repacking_holds_each_document_once_in_as_many_rows(problem, times, seed):
    lengths, capacity = np.array(problem[0], dtype=np.int64), problem[1]
    packings = repack(lengths, capacity, times=times, seed=seed)
    assert len(packings) == times
    for offsets, order in packings:
        assert sorted(order.tolist()) == list(range(lengths.size))
        assert offsets.size == packings[0][0].size
        rows = [order[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        assert all(row.size and lengths[row].sum() <= capacity for row in rows)
    again = repack(lengths, capacity, times=times, seed=seed)
    assert all(
        np.array_equal(a, b) for one, two in zip(packings, again, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_repacking_mixes_documents_at_hardly_any_cost_and_another_seed_mixes_others():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(300), 1, 6_000), 1, 4096).astype(np.int64)
    packings = repack(lengths, 4096, times=3, seed=1)
    assert packings[0][0].size - 1 <= 1.002 * lower_bound(lengths, 4096)
    rows = [{tuple(row.tolist()) for row in np.split(order, offsets[1:-1])} for offsets, order in packings]
    assert all(len(a & b) < 0.1 * len(a) for a, b in itertools.combinations(rows, 2))
    other = repack(lengths, 4096, times=2, seed=2)[1]
    assert not np.array_equal(other[1], packings[1][1])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), capacity=st.integers(3, 30), seed=st.integers(0, 9))
def test_documents_laid_end_to_end_fill_every_row_and_lose_nothing(lengths, capacity, seed):
    lengths = np.array(lengths, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(lengths.size)
    pieces = end_to_end(lengths, capacity, order)
    begin = np.append(0, np.cumsum(lengths))[pieces.document] + pieces.start
    laid = [t for a, n in zip(begin.tolist(), pieces.length.tolist(), strict=True) for t in range(a, a + n)]
    tokens = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1]) if lengths.size else []
    assert laid == [t for d in order for t in tokens[d].tolist()]
    rows = np.add.reduceat(pieces.length, pieces.offsets[:-1]).tolist() if laid else []
    assert len(rows) == lower_bound(lengths, capacity)
    assert all(n == capacity for n in rows[:-2])
    assert not rows or 1 <= rows[-1] <= capacity
    assert len(rows) < 2 or rows[-1] >= 2
