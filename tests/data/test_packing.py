"""Best-fit-decreasing is exact, deterministic, and the same compiled or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import packing
from launcher.data.packing import lower_bound, one_a_row, pack

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


def test_a_hundred_thousand_log_normal_lengths_fill_rows_to_within_half_a_permille():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(300), 1, 100_000), 1, 4096).astype(np.int64)
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
