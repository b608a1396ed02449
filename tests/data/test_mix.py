"""How sources share an epoch: the shares, the places in it, the order within each, and the cost of a place."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.mix import Mix, Size, epoch_rows, interleave, shares
from launcher.data.names import source_names
from launcher.data.order import global_batch_rows
from launcher.data.store import Store
from launcher.recipe.schema import Source
from tests.data.make import tiny_store

DRAWS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


class Rows:
    """As much of a store as the order of rows asks for."""

    def __init__(self, rows: int, packings: int = 1) -> None:
        self.rows, self.packings, self.isolate, self.num_documents = rows, packings, True, rows
        self.row_tokens = self.row_cost = self.row_weight = np.broadcast_to(np.int64(1), rows)
        self.index = self
        self.length = self.side = self.row_tokens

    def packing(self, _number: int) -> Rows:
        return self


def mix(rows: list[int], draws: list[int] | None = None, packings: int = 1) -> Mix:
    stores: list[Any] = [Rows(count, packings) for count in rows]
    return Mix.of(stores, draws)


def drawn(made: Mix, source: int, positions: int) -> list[int]:
    """Rows of one source in the order they come, as its own numbers."""
    rows = made.at(np.arange(positions), seed=3)
    first = sum(store.rows * store.packings for store in made.stores[:source])
    return [int(row) - first for row in rows[made.source_of(rows) == source]]


@given(DRAWS)
def test_each_source_has_its_turns_in_every_epoch_and_they_are_numbered(draws):
    source, turn = interleave(np.arange(sum(draws)), draws)
    for number, count in enumerate(draws):
        assert turn[source == number].tolist() == list(range(count))


def farthest(draws) -> float:
    """Rows by which a source is off its share at the worst place of an epoch."""
    total = sum(draws)
    source, _ = interleave(np.arange(total), draws)
    wanted = np.arange(1, total + 1) / total
    return max(np.abs(np.cumsum(source == i) - wanted * count).max() for i, count in enumerate(draws))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_up_to_any_place_each_of_three_sources_is_within_a_row_of_its_share(draws):
    assert farthest(draws) <= 1


@given(st.lists(st.integers(1, 40), min_size=4, max_size=12))
def test_many_sources_stay_near_their_shares_too(draws):
    assert farthest(draws) <= 0.5 + np.log(len(draws))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=4), st.integers(1, 3))
def test_each_row_of_a_source_comes_once_in_each_round_of_that_source(sources, packings):
    made = mix([rows for rows, _ in sources], [draws for _, draws in sources], packings)
    for number, (rows, _) in enumerate(sources):
        order = drawn(made, number, 5 * made.rows)
        for round_, begin in enumerate(range(0, len(order) - rows + 1, rows)):
            packing = round_ % packings
            assert sorted(order[begin : begin + rows]) == list(range(packing * rows, (packing + 1) * rows))


def test_one_source_alone_comes_in_the_order_of_the_keyed_permutation():
    for step in (0, 3, 1000):
        kwargs = {"seed": 7, "step": step, "global_batch_size": 8}
        expected = global_batch_rows(37, **kwargs)
        assert mix([37]).global_batch(step, seed=7, global_batch_size=8).tolist() == expected.tolist()
    assert mix([37]).global_batch(4, seed=7, global_batch_size=8, total_rows=37).size == 5


def test_a_source_beside_others_leaves_the_order_within_each_of_them():
    two, three = mix([20, 30]), mix([20, 30, 11])
    for source in (0, 1):
        assert drawn(two, source, 300)[:100] == drawn(three, source, 400)[:100]
    before = mix([11, 20, 30], [5, 20, 30])
    assert drawn(before, 1, 400)[:100] == drawn(two, 0, 300)[:100]


def test_another_weight_changes_when_rows_come_not_in_which_order():
    assert drawn(mix([20, 30], [20, 30]), 0, 500)[:90] == drawn(mix([20, 30], [60, 30]), 0, 500)[:90]


@pytest.mark.parametrize("first", [0, 10**6, 10**12])
def test_l6_a_place_far_on_is_arithmetic_like_the_first(first):
    made = mix([10**8, 3 * 10**7, 12345], [10**8, 6 * 10**7, 500])
    rows = made.at(np.arange(first, first + 64), seed=1)
    one_by_one = [int(made.at(np.array([place]), seed=1)[0]) for place in range(first, first + 64)]
    assert rows.tolist() == one_by_one


def test_epochs_of_more_rows_than_32_bits_count_stay_exact():
    draws = [3 * 2**31 + 1, 2**31, 7]
    total = sum(draws)
    source, turn = interleave(np.array([0, 1, total - 2, total - 1], dtype=np.int64), draws)
    assert all(0 <= place < draws[number] for number, place in zip(source.tolist(), turn.tolist(), strict=True))
    whole = [
        sum(interleave(np.array([place]), draws)[0][0] == 0 for place in range(begin, begin + 8))
        for begin in (0, total - 8)
    ]
    assert whole == [6, 6]  # three of four


SIZES = [Size(rows=100, tokens=6400, documents=700), Size(rows=40, tokens=1600, documents=40)]


def test_without_weights_each_source_is_seen_once():
    for until in ("total", "first", "last"):
        for by in ("tokens", "rows", "documents"):
            assert epoch_rows(SIZES, shares(SIZES, [None, None], by=by), by=by, until=until) == [100, 40]


@pytest.mark.parametrize("by", ["tokens", "rows", "documents"])
def test_weights_are_shares_of_the_unit_within_a_row(by):
    wanted = shares(SIZES, [3.0, 1.0], by=by)
    assert wanted == [0.75, 0.25]
    rows = epoch_rows(SIZES, wanted, by=by)
    amounts = [count * getattr(size, by) / size.rows for count, size in zip(rows, SIZES, strict=True)]
    whole = sum(getattr(size, by) for size in SIZES)
    for amount, share, size in zip(amounts, wanted, SIZES, strict=True):
        assert abs(amount - share * whole) <= getattr(size, by) / size.rows / 2  # half a row


def test_an_epoch_ends_when_the_first_or_the_last_source_is_used_up():
    wanted = shares(SIZES, [1.0, 1.0])
    first, last = (epoch_rows(SIZES, wanted, until=until) for until in ("first", "last"))
    assert first == [25, 40]
    assert last == [100, 160]


def test_a_temperature_evens_shares_out():
    natural = shares(SIZES, [None, None])
    assert natural == [0.8, 0.2]
    warm = shares(SIZES, [None, None], temperature=2.0)
    assert warm == pytest.approx([2 / 3, 1 / 3])
    assert shares(SIZES, [4.0, 1.0], temperature=2.0) == pytest.approx(warm)
    assert shares(SIZES, [4.0, 1.0], temperature=1e-3) == [1.0, 0.0]
    assert epoch_rows(SIZES, [1.0, 0.0])[1] == 1  # no source is left out


def test_rows_and_documents_of_several_stores_are_numbered_as_of_one(tmp_path):
    stores = [Store.open(tiny_store(tmp_path / str(i), [20 + i, 30, 9, 40], seed=i)) for i in range(3)]
    made = Mix.of(stores)
    number = 0
    for source, store in enumerate(stores):
        for row in range(store.rows):
            ids = np.array([number])
            assert made.source_of(ids).tolist() == [source]
            assert made.row_tokens[ids] == store.row_tokens[[row]]
            assert made.row_weight[ids] == store.row_weight[[row]]
            ours, theirs = list(made.documents(number)), list(store.documents(row))
            assert [d.tokens.tolist() for d in ours] == [d.tokens.tolist() for d in theirs]
            lengths = made.document_lengths(made.row_documents(number))
            assert lengths.tolist() == [len(d.tokens) for d in theirs]
            number += 1
    assert number == made.rows
    documents = Counter(d for row in range(number) for d in made.row_documents(row).tolist())
    assert documents == Counter(range(12))
    everything = np.arange(number)
    assert made.tokens_of_sources(everything).tolist() == [int(store.row_tokens.sum()) for store in stores]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/chat.jsonl", "chat"), ("data/llama3.1.jsonl.gz", "llama3.1"), ("data/parts/*.parquet", "parts"),
        ("dataset_info.json#identity", "identity"), ("x.jsonl#500", "x"), ("org/llama3.1", "llama3.1"),
        ("s3://bucket/some/web.json", "web"), ("*.json", "data"), ("data/saved/", "saved"),
    ],
)  # fmt: skip
def test_a_source_is_called_by_the_last_part_of_its_path(path, name):
    assert source_names([Source(path=path)]) == [name]


def test_names_from_paths_differ_and_names_that_are_given_stay():
    sources = [Source(path="a/x.json"), Source(path="b/x.json"), Source(path="c", name="x-2"), Source(path="x")]
    assert source_names(sources) == ["x", "x-3", "x-2", "x-4"]
    assert source_names([Source(path="a", name="same"), Source(path="b", name="same")]) == ["same", "same"]
