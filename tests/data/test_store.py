"""A store gives back what was written, and appears whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.store import Encoded, Store, count_targets, open_part, write_part
from launcher.errors import UserError
from tests.data.make import tiny_store


def test_rows_know_their_tokens_cost_and_weight(tmp_path):
    lengths = [5, 9, 30, 12, 40, 3, 22]
    store = Store.open(tiny_store(tmp_path, lengths, seq_len=50))
    seen = []
    for row in range(store.rows):
        documents = list(store.documents(row))
        seen += store.row_documents(row).tolist()
        assert store.row_tokens[row] == sum(len(d.tokens) for d in documents)
        assert store.row_cost[row] == sum(len(d.tokens) ** 2 for d in documents)
        assert store.row_weight[row] == sum(float(d.weights[1:].sum()) for d in documents)
    assert sorted(seen) == list(range(len(lengths)))
    assert [len(store.document(d).tokens) for d in range(len(lengths))] == lengths
    assert store.manifest["trained_tokens"] == store.manifest["trained_weight"] == store.row_weight.sum()
    assert store.manifest["packing_efficiency"] == sum(lengths) / (store.rows * 50)


def test_arrays_are_memory_maps_and_token_ids_take_two_bytes_where_they_fit(tmp_path):
    store = Store.open(tiny_store(tmp_path, [4, 5], vocab=65536))
    assert isinstance(store.row_cost, np.memmap)
    assert open_part(tmp_path / "tokens" / "part-00000")["tokens"].dtype == np.uint16
    assert store.document(0).tokens.dtype == np.uint32
    assert store.document(0).weights.dtype == np.float32
    wide = Encoded()
    wide.add(np.array([70_000], np.uint32), np.array([0.5], np.float32), file=0, record=0)
    write_part(tmp_path / "wide", wide, vocab_size=70_001)
    assert open_part(tmp_path / "wide")["tokens"].tolist() == [70_000]
    assert open_part(tmp_path / "wide")["weights"].tolist() == [0.5]


def test_a_folder_that_holds_no_store_or_one_of_another_version_is_refused(tmp_path):
    with pytest.raises(UserError, match="no data store lies here"):
        Store.open(tmp_path)
    path = tiny_store(tmp_path, [4, 5])
    manifest = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="version 99, expected 2"):
        Store.open(path)


def test_a_cache_folder_can_be_moved(tmp_path):
    before = Store.open(tiny_store(tmp_path / "a", [4, 5])).document(1).tokens.copy()
    (tmp_path / "a").rename(tmp_path / "b")
    assert np.array_equal(Store.open(tmp_path / "b" / "packed" / "tiny").document(1).tokens, before)


def test_writing_leaves_no_temporary_folder(tmp_path):
    tiny_store(tmp_path, [4, 5])
    assert [p.name for p in tmp_path.rglob(".*")] == []


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), max_size=12), seed=st.integers(0, 99), shuffled=st.booleans())
def test_targets_of_all_documents_at_once_are_those_of_each_alone(lengths, seed, shuffled):
    random = np.random.default_rng(seed)
    weights = random.choice(np.array([0, 0.1, 0.5, 1], np.float32), sum(lengths))
    starts = np.cumsum([0, *lengths])[:-1].astype(np.int64)
    documents = random.permutation(len(lengths)) if shuffled else np.arange(len(lengths))
    starts, sizes = starts[documents], np.array(lengths, dtype=np.int64)[documents]
    found = count_targets(weights, starts, sizes)
    for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        own = weights[start : start + size]
        assert found.trained[i] == np.count_nonzero(own[1:])
        assert found.weight[i] == pytest.approx(own[1:].sum(dtype=np.float64), abs=1e-12)
        assert found.first[i] == (own[0] if size else 0)


def test_sides_and_hashes_of_records_are_kept_and_groups_counted(tmp_path):
    store = Store.open(tiny_store(tmp_path, [5, 9, 30, 12, 4, 7], sides=[0, 1, 2, 3, 4, 4], seq_len=50))
    assert store.manifest["groups"] == {"plain": 1, "pairs": 1, "labelled": 3}
    assert store.manifest["documents"] == 6
    assert [store.document(d).side for d in range(6)] == [0, 1, 2, 3, 4, 4]
    assert store.index.hash.tolist() == [0, 1, 1, 3, 4, 5]
    assert store.index.record.tolist() == [0, 1, 1, 3, 4, 5]
    assert store.num_documents == 6


def test_several_packings_lie_in_one_store_over_one_index(tmp_path):
    store = Store.open(tiny_store(tmp_path, list(range(2, 60)), repack=3))
    assert (store.packings, store.manifest["repack"]) == (3, 3)
    assert store.packing(0) is store
    assert store.packing(4) is store.packing(1)
    for number in range(3):
        view = store.packing(number)
        assert view.rows == store.rows
        assert sorted(d for row in range(view.rows) for d in view.row_documents(row).tolist()) == list(range(58))
        assert [sum(len(d.tokens) for d in view.documents(row)) for row in range(view.rows)] == view.row_tokens.tolist()
    assert store.row_weight.sum() == store.packing(1).row_weight.sum() == store.packing(2).row_weight.sum()


def test_pieces_of_a_document_count_as_one(tmp_path):
    whole = Store.open(tiny_store(tmp_path / "a", [40, 50, 60], packing="concat"))
    assert whole.num_documents > 3
    assert whole.manifest["documents"] == whole.manifest["groups"]["plain"] == 3
    assert whole.manifest["tokens"] == 150


def test_a_part_holds_hashes_of_64_bits_and_counts_of_each_document(tmp_path):
    documents = Encoded()
    for number in range(2000):
        documents.add(np.arange(50, dtype=np.uint32), np.ones(50, np.uint8), file=0, record=number, hash=2**64 - 1)
    write_part(tmp_path / "part", documents, vocab_size=100)
    part = open_part(tmp_path / "part")
    assert part["hash"].tolist() == [2**64 - 1] * 2000
    assert part["trained"].tolist() == [49] * 2000
    assert part["weights"].dtype == np.uint8
