"""A store gives back what was written, and appears whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launcher.data.store import Encoded, Store, open_part, write_part
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
