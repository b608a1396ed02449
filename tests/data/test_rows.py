"""Rows hold every token that was not counted as lost: once, with pairs together, and targets where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.rows import Held, build_rows, held_out
from launcher.data.store import Encoded, Side, Store, write_part, write_store
from launcher.errors import UserError
from launcher.recipe.schema import Data, Objective, Recipe

SEQ_LEN = 16
FRESH = [HealthCheck.function_scoped_fixture]
plain = st.lists(st.tuples(st.integers(2, 50), st.booleans()), min_size=1, max_size=30)
paired = st.lists(st.tuples(st.integers(2, 12), st.integers(0, 12)), min_size=1, max_size=20)


def recipe(objective="pretrain", **data):
    return Recipe(data=Data(seq_len=SEQ_LEN, **data), objective=Objective(kind=objective))


def part(folder, documents):
    """A part of documents given as (length, side, trained); token t of all is number t."""
    encoded, token, record = Encoded(), 0, -1
    for length, side, trained in documents:
        record += side != Side.rejected
        ids = np.arange(token, token + length, dtype=np.uint32)
        weights = np.full(length, 1 if trained else 0, dtype=np.uint8)
        encoded.add(ids, weights, file=0, record=record, side=side, hash=1000 + record)
        token += length
    path = folder / f"part-{len(list(folder.iterdir()))}"
    write_part(path, encoded, vocab_size=100_000)
    return path


def laid(folder, documents, *, repack=1, held=Held.all, **data):
    """(store, rows) of these documents."""
    made = recipe(**data)
    where = part(folder, documents)
    rows = build_rows([[where]], [["made"]], held=held, recipe=made, repack=repack)
    path = where.with_suffix(".store")
    write_store(
        path, parts=[where], files=["made"], index=rows.index, packings=rows.packings, seq_len=SEQ_LEN,
        isolate=made.data.isolate,
    )  # fmt: skip
    return Store.open(path), rows


def tokens_of(store):
    """The tokens of each row, and the documents' lengths in it."""
    return [[d.tokens.tolist() for d in store.documents(row)] for row in range(store.rows)]


def flat(lists):
    return [x for inner in lists for x in inner]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=FRESH)
@given(documents=plain, packing=st.sampled_from(["best_fit", "concat", "none"]))
def test_every_token_of_plain_documents_is_in_one_row_and_no_row_is_too_long(tmp_path, documents, packing):
    store, rows = laid(tmp_path, [(n, 0, True) for n, _ in documents], packing=packing, overlong="split")
    found = tokens_of(store)
    assert sorted(flat(flat(found))) == list(range(sum(n for n, _ in documents)))
    assert all(len(flat(row)) <= SEQ_LEN for row in found)
    assert store.row_tokens.tolist() == [len(flat(row)) for row in found]
    assert store.manifest["documents"] == len(documents)
    assert not rows.dropped
    if packing == "concat":
        assert [len(flat(row)) for row in found[:-2]] == [SEQ_LEN] * (store.rows - 2) or store.rows < 2
        assert store.rows == -(-sum(n for n, _ in documents) // SEQ_LEN)
    if packing == "none":
        assert [len(row) for row in found] == [1] * store.rows


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=FRESH)
@given(pairs=paired, packing=st.sampled_from(["best_fit", "none"]), repack=st.integers(1, 3))
def test_the_two_of_a_pair_lie_side_by_side_in_one_row_of_every_packing(tmp_path, pairs, packing, repack):
    documents = []
    for chosen, rejected in pairs:
        rejected = min(rejected, SEQ_LEN - chosen)
        documents += [(chosen, 1, True), (rejected, 2, True)] if rejected > 1 else [(chosen, 0, True)]
    store, _ = laid(tmp_path, documents, packing=packing, repack=repack if packing == "best_fit" else 1)
    assert store.manifest["groups"]["pairs"] == sum(side == 1 for _, side, _ in documents)
    for view in [store.packing(k) for k in range(store.packings)]:
        assert view.rows == store.rows
        assert sorted(flat(flat(tokens_of(view)))) == list(range(sum(n for n, _, _ in documents)))
        assert max(view.row_tokens) <= SEQ_LEN
        for row in range(view.rows):
            sides = [d.side for d in view.documents(row)]
            records = [d.record for d in view.documents(row)]
            assert all(sides[i + 1] == 2 and records[i + 1] == records[i] for i, s in enumerate(sides) if s == 1)
            assert all(i and sides[i - 1] == 1 for i, s in enumerate(sides) if s == 2)


def test_long_pairs_are_refused_dropped_or_truncated_to_one_length(tmp_path):
    documents = [(5, 1, True), (6, 2, True), (20, 1, True), (4, 2, True), (30, 1, True), (25, 2, True), (3, 0, True)]
    with pytest.raises(
        UserError, match=r"2 records are longer, the longest has 55 tokens.*\n  made: record 1 \(row 2\): 24 t"
    ):
        laid(tmp_path, documents)
    store, rows = laid(tmp_path, documents, overlong="drop")
    assert rows.dropped == {"longer than seq_len": 2}
    assert store.manifest["groups"] == {"plain": 1, "pairs": 1, "labelled": 0}
    store, rows = laid(tmp_path, documents, overlong="truncate")
    assert rows.changed == {"truncated to seq_len": 2}
    assert rows.first == {"truncated to seq_len": "made: record 1 (row 2)"}
    assert store.document_lengths(np.arange(7)).tolist() == [5, 6, 12, 4, 8, 8, 3]
    with pytest.raises(UserError, match=r"overlong = split: made: record 1 \(row 2\) is a pair"):
        laid(tmp_path, documents, overlong="split")
    with pytest.raises(UserError, match=r"packing = concat: made: record 0 \(row 1\) is a pair.*expected best_fit"):
        laid(tmp_path, documents, packing="concat")


def test_a_pair_of_which_one_side_teaches_nothing_after_truncation_goes_whole(tmp_path):
    where = part(tmp_path, [(4, 0, True), (20, 1, True), (20, 2, True)])
    weights = np.load(where / "weights.npy")
    weights[4:20] = 0  # the chosen answer begins after what is kept
    np.save(where / "weights.npy", weights)
    rows = build_rows([[where]], [["made"]], held=Held.all, recipe=recipe(overlong="truncate"))
    assert rows.index.length.tolist() == [4]
    assert rows.dropped == {"no trained token left when truncated to seq_len": 1}
    assert not rows.changed  # what is dropped counts once


def test_a_pair_whose_sides_are_the_same_after_truncation_is_dropped_and_counted(tmp_path):
    where = part(tmp_path, [(4, 0, True), (30, 1, True), (31, 2, True), (30, 1, True), (30, 2, True)])
    tokens = np.load(where / "tokens.npy")
    tokens[34:65] = [*tokens[4:34], 7]
    np.save(where / "tokens.npy", tokens)
    rows = build_rows([[where]], [["made"]], held=Held.all, recipe=recipe(overlong="truncate"))
    assert rows.index.length.tolist() == [4, 8, 8]
    assert rows.dropped == {"chosen and rejected are the same when truncated to seq_len": 1}
    assert rows.changed == {"truncated to seq_len": 1}


def test_split_documents_are_whole_again_when_laid_together_and_no_piece_is_a_single_token(tmp_path):
    store, rows = laid(tmp_path, [(33, 0, True), (16, 0, True), (17, 0, True)], overlong="split")
    assert rows.index.length.tolist() == [16, 15, 2, 16, 15, 2]
    assert rows.changed == {"split at seq_len": 2}
    assert not rows.dropped
    assert store.manifest["documents"] == 3
    assert store.manifest["trained_tokens"] == 33 + 16 + 17 - 6
    _, rows = laid(tmp_path, [(33, 0, False), (16, 0, True)], overlong="split")
    assert rows.dropped == {"no trained token left when split at seq_len": 1}
    assert not rows.changed


def test_pieces_of_which_nothing_is_trained_ride_along_but_make_no_row_of_their_own(tmp_path):
    where = part(tmp_path, [(37, 0, True), (9, 0, True)])
    weights = np.load(where / "weights.npy")
    weights[:16] = 0  # a prompt longer than a row
    weights[33:37] = 0  # what follows the answer's end; its last token begins a piece
    np.save(where / "weights.npy", weights)
    rows = build_rows([[where]], [["made"]], held=Held.all, recipe=recipe(overlong="split"))
    offsets, documents = rows.packings[0]
    assert rows.dropped == {"no trained token in their row": 1}
    assert [rows.index.length[d].tolist() for d in np.split(documents, offsets[1:-1])] == [[16], [5, 9]]
    several = build_rows([[where]], [["made"]], held=Held.all, recipe=recipe(overlong="split"), repack=2)
    assert not several.dropped  # the document lives on in its other piece
    assert several.changed == {"split at seq_len": 1, "a piece without trained tokens left out": 2}
    assert all(documents.size == 2 for _, documents in several.packings)


def test_concatenated_rows_count_targets_across_borders_only_when_not_isolated(tmp_path):
    documents = [(7, 0, True), (9, 0, True), (20, 0, True), (13, 0, True)]
    apart, _ = laid(tmp_path, documents, packing="concat")
    whole, _ = laid(tmp_path, documents, packing="concat", isolate=False)
    assert [len(flat(row)) for row in tokens_of(whole)] == [16, 16, 15, 2]  # a last row of one token takes another
    assert tokens_of(whole) == tokens_of(apart)
    assert whole.row_weight.tolist() == [15, 15, 14, 1]
    assert whole.row_cost.tolist() == [256, 256, 225, 4]
    assert whole.manifest["trained_tokens"] == 45
    segments = [[len(d) for d in row] for row in tokens_of(apart)]
    assert apart.row_weight.tolist() == [sum(n - 1 for n in row) for row in segments]
    assert apart.row_cost.tolist() == [sum(n * n for n in row) for row in segments]


def test_concatenated_rows_do_not_depend_on_the_order_of_the_records(tmp_path):
    def rows(order):
        documents = [(4 + i % 9, i) for i in range(40)]
        encoded = Encoded()
        for i in order:
            length, name = documents[i]
            ids = np.full(length, name, np.uint32)
            encoded.add(ids, np.ones(length, np.uint8), file=0, record=len(encoded.tokens), hash=name + 7)
        path = tmp_path / f"p{order[0]}"
        write_part(path, encoded, vocab_size=100)
        made = build_rows([[path]], [["made"]], held=Held.all, recipe=recipe(packing="concat"))
        return np.load(path / "tokens.npy")[made.index.start].tolist(), made.packings[0][0].tolist()

    assert rows(list(range(40))) == rows(list(reversed(range(40))))


def test_rows_of_which_nothing_is_trained_are_left_out_of_concatenation_and_counted(tmp_path):
    _, rows = laid(tmp_path, [(40, 0, False), (10, 0, True)], packing="concat", objective="sft")
    assert rows.dropped == {"no trained token in their row": 2}
    assert rows.packings[0][0].size - 1 == 2


def test_hold_out_is_the_same_for_copies_and_under_growth_and_new_order():
    hashes = np.random.default_rng(0).integers(0, 2**63, 2000, dtype=np.uint64)
    hashes[10] = hashes[0]
    out = held_out(hashes, seed=3, fraction=0.1)
    assert 150 < out.sum() < 250
    assert out[10] == out[0]
    more = np.append(hashes[::-1], np.arange(1, 500, dtype=np.uint64))
    assert np.array_equal(held_out(more, seed=3, fraction=0.1)[:2000][::-1], out)
    assert not np.array_equal(held_out(hashes, seed=4, fraction=0.1), out)
    assert held_out(hashes[:2], seed=3, fraction=1e-9).sum() == 1
    assert held_out(hashes[:1], seed=3, fraction=1e-9).sum() == 0
    assert held_out(hashes[:0], seed=3, fraction=0.1).size == 0


def test_held_and_rest_are_all_records_with_pairs_on_one_side(tmp_path):
    where = part(tmp_path, [(5, 1, True), (6, 2, True)] * 60)
    made = recipe(eval_fraction=0.2)
    sides = [build_rows([[where]], [["made"]], held=held, recipe=made).index for held in (Held.rest, Held.held)]
    assert sum(index.length.size for index in sides) == 120
    assert all(index.length.size and index.side.tolist() == [1, 2] * (index.length.size // 2) for index in sides)
    assert not set(sides[0].record.tolist()) & set(sides[1].record.tolist())


def test_files_are_numbered_over_all_sources(tmp_path):
    paths = [part(tmp_path, [(4, 0, True)]) for _ in range(3)]
    rows = build_rows([paths[:1], paths[1:]], [["a", "b"], ["c"]], held=Held.all, recipe=recipe())
    assert rows.index.file.tolist() == [0, 2, 2]
