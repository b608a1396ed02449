"""Every split of a global batch over ranks and micro-batches holds the same rows, targets and weights."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from launcher.data.batches import Batches, eval_batches
from launcher.data.store import Store
from tests.data.make import tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    random = np.random.default_rng(1)
    return Store.open(tiny_store(tmp_path_factory.mktemp("store"), random.integers(2, 60, 120).tolist(), seq_len=64))


def batches(store, *, world_size, rank, micro, **kwargs):
    kwargs = {"seed": 5, "global_batch_size": 12, "total_steps": 20, **kwargs}
    return Batches(store, world_size=world_size, rank=rank, micro_batch_size=micro, **kwargs)


def targets(micro):
    """Multiset of (input, target, weight) over the trained positions."""
    at = micro.weights > 0
    columns = micro.input_ids[at], micro.targets[at], micro.position_ids[at], micro.weights[at]
    return Counter(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize(("world_size", "micro"), list(itertools.product((1, 2, 3, 4, 5), (1, 2, 3))))
@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_l1_every_split_covers_the_same_rows_and_targets_exactly_once(store, world_size, micro, layout):
    whole = batches(store, world_size=1, rank=0, micro=12).step(7)
    parts = [
        batches(store, world_size=world_size, rank=r, micro=micro, layout=layout).step(7) for r in range(world_size)
    ]
    assert len({len(part.micro) for part in parts}) == 1
    every = [m for part in parts for m in part.micro]
    assert sum((targets(m) for m in every), Counter()) == targets(whole.micro[0])
    assert sorted(d for m in every for d in m.documents) == sorted(whole.micro[0].documents)
    assert {r for m in every for r in m.rows} == set(whole.rows.tolist())
    if layout == "packed":
        assert sorted(r for m in every for r in m.rows) == sorted(whole.rows.tolist())
    for part in parts:
        assert np.array_equal(part.rows, whole.rows)
        assert (part.weight, part.tokens) == (whole.weight, whole.tokens)


def test_l3_the_weight_known_from_the_store_is_the_sum_over_all_ranks(store):
    for step in range(20):
        parts = [batches(store, world_size=3, rank=r, micro=2).step(step) for r in range(3)]
        laid = sum(float(m.weights.sum()) for part in parts for m in part.micro)
        assert laid == pytest.approx(parts[0].weight, abs=1e-9)
        assert sum(m.tokens for part in parts for m in part.micro) == parts[0].tokens


def test_the_last_token_of_a_document_and_padding_are_never_trained(store):
    for micro in batches(store, world_size=2, rank=1, micro=3).step(0).micro:
        borders = micro.cu_seqlens
        assert borders[0] == 0
        assert borders[-1] == micro.input_ids.size
        assert micro.max_seqlen == np.diff(borders).max()
        weights, positions = micro.weights.reshape(-1), micro.position_ids.reshape(-1)
        for begin, end in itertools.pairwise(borders.tolist()):
            assert weights[end - 1] == 0
            assert np.array_equal(positions[begin:end], np.arange(end - begin))


def test_l2_targets_and_inputs_are_those_of_the_document_alone(store):
    for micro in batches(store, world_size=1, rank=0, micro=4).step(3).micro:
        flat = {name: getattr(micro, name).reshape(-1) for name in ("input_ids", "targets", "weights")}
        borders = itertools.pairwise(micro.cu_seqlens.tolist())
        real = [(a, b) for a, b in borders if flat["input_ids"][a:b].any() or flat["weights"][a:b].any()]
        assert len(real) == len(micro.documents)
        for (begin, end), number in zip(real, micro.documents, strict=True):
            document = store.document(number)
            assert np.array_equal(flat["input_ids"][begin:end], document.tokens)
            assert np.array_equal(flat["targets"][begin : end - 1], document.tokens[1:])
            assert np.array_equal(flat["weights"][begin : end - 1], document.weights[1:])


def test_l5_another_rank_count_sees_the_same_rows_in_the_same_global_order(store):
    for step in range(20):
        rows = [batches(store, world_size=w, rank=0, micro=1).step(step).rows.tolist() for w in (1, 2, 3, 4)]
        assert all(r == rows[0] for r in rows)


def test_empty_slots_are_rows_of_weight_zero_and_the_last_batch_may_be_short(store):
    parts = [
        batches(store, world_size=4, rank=r, micro=2, global_batch_size=6, total_steps=2, total_rows=7).step(1)
        for r in range(4)
    ]
    assert [len(p.micro) for p in parts] == [1, 1, 1, 1]
    assert sum(len(m.rows) for p in parts for m in p.micro) == 1
    empty = [m for p in parts for m in p.micro if not m.rows]
    assert len(empty) == 3
    assert all(m.weights.sum() == 0 and m.tokens == 0 and m.input_ids.shape == (2, 8) for m in empty)


def test_a_step_outside_the_run_is_refused(store):
    with pytest.raises(IndexError, match="step 20 of a run of 20 steps"):
        batches(store, world_size=1, rank=0, micro=1).step(20)


def test_pad_to_fixes_the_width_of_every_row(store):
    step = batches(store, world_size=2, rank=0, micro=1, pad_to=64).step(2)
    assert {m.input_ids.shape for m in step.micro} == {(1, 64)}


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 3), (3, 2), (4, 5)])
def test_evaluation_covers_every_row_once_with_equal_counts_on_each_rank(store, world_size, micro):
    ranks = [
        list(eval_batches(store, micro_batch_size=micro, world_size=world_size, rank=r)) for r in range(world_size)
    ]
    assert len({len(r) for r in ranks}) == 1
    assert sorted(row for r in ranks for m in r for row in m.rows) == list(range(store.rows))
    assert sum(float(m.weights.sum()) for r in ranks for m in r) == pytest.approx(float(store.row_weight.sum()))


@pytest.mark.parametrize("width", [None, 64])
def test_rows_that_are_not_isolated_are_one_segment_whose_targets_cross_borders(tmp_path, width):
    path = tiny_store(tmp_path, [20, 30, 9, 40, 25, 33], packing="concat", isolate=False, trained=1.0)
    store = Store.open(path)
    parts = [batches(store, world_size=2, rank=r, micro=2, global_batch_size=store.rows, pad_to=width) for r in (0, 1)]
    micro = [m for part in parts for m in part.step(0).micro]
    assert sum(float(m.weights.sum()) for m in micro) == parts[0].step(0).weight == 157 - store.rows
    assert parts[0].step(0).cost == sum(n * n for n in store.row_tokens.tolist())
    for m in micro:
        for row, number in enumerate(m.rows):
            tokens = np.concatenate([d.tokens for d in store.documents(number)])
            assert np.array_equal(m.input_ids[row, : tokens.size], tokens)
            assert np.array_equal(m.targets[row, : tokens.size - 1], tokens[1:])
            assert np.array_equal(m.position_ids[row, : tokens.size], np.arange(tokens.size))
            assert m.weights[row].sum() == tokens.size - 1 == store.row_weight[number]
    with pytest.raises(ValueError, match="not isolated"):
        batches(store, world_size=1, rank=0, micro=1, layout="documents")


def test_l2_the_documents_of_a_pair_are_laid_as_if_alone_and_say_their_sides(tmp_path):
    store = Store.open(tiny_store(tmp_path, [20, 12, 9, 40, 25, 33, 5, 6], sides=[1, 2, 0, 1, 2, 0, 3, 4], seq_len=70))
    packed, alone = (
        batches(store, world_size=1, rank=0, micro=8, global_batch_size=store.rows, layout=layout).step(0).micro
        for layout in ("packed", "documents")
    )
    assert sum((targets(m) for m in packed), Counter()) == sum((targets(m) for m in alone), Counter())
    for micro in (*packed, *alone):
        assert micro.sides == [store.document(d).side for d in micro.documents]
    laid = [d for m in packed for d in m.documents]
    assert all(laid.index(d + 1) == laid.index(d) + 1 for d in (0, 3))


def test_rows_of_a_store_that_was_not_packed_share_micro_batches_with_rows_of_like_length(tmp_path):
    lengths = np.random.default_rng(0).permutation(np.repeat([8, 24, 56], 16)).tolist()
    store = Store.open(tiny_store(tmp_path, lengths, packing="none"))
    steps = [
        batches(store, world_size=4, rank=r, micro=4, global_batch_size=48, total_steps=1, by_length=True).step(0)
        for r in range(4)
    ]
    assert all(m.tokens == m.input_ids.size for step in steps for m in step.micro)


def test_every_epoch_of_a_repacked_store_sees_each_document_once_in_other_company(tmp_path):
    random = np.random.default_rng(1)
    store = Store.open(tiny_store(tmp_path, random.integers(2, 30, 300).tolist(), repack=3))
    epochs = []
    for epoch in range(3):
        whole = batches(store, world_size=1, rank=0, micro=store.rows, global_batch_size=store.rows).step(epoch)
        assert sorted(whole.micro[0].documents) == list(range(300))
        packing = store.packing(epoch)
        epochs.append({tuple(packing.row_documents(row).tolist()) for row in range(packing.rows)})
    assert len(epochs[0] & epochs[1]) < store.rows / 4
    assert len(epochs[1] & epochs[2]) < store.rows / 4
