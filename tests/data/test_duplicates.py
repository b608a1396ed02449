"""Exact duplicates are counted within training data and between training and evaluation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data import duplicates
from launcher.data.duplicates import Duplicates, count, find_duplicates, record_hashes
from launcher.data.packing import one_a_row
from launcher.data.store import Encoded, Index, Store, write_part, write_store

HASHES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=20)


@given(st.lists(HASHES, min_size=1, max_size=3), HASHES, st.sampled_from([1, 7, 1 << 26]))
def test_counts_are_those_of_counting_one_by_one_however_many_are_sorted_at_once(train, held, at_once):
    arrays = [np.array(hashes, dtype=np.uint64) for hashes in train]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_AT_ONCE", at_once)
        found = count(arrays, {"held": np.array(held, dtype=np.uint64)})
    seen = Counter(h for hashes in train for h in hashes)
    assert found == Duplicates(sum(seen.values()) - len(seen), {"held": sum(h in seen for h in held)})


def store(folder, hashes, sides):
    """A store with a document for each (hash, side); the second of a pair belongs to the record before."""
    documents, record = Encoded(), -1
    for number, side in zip(hashes, sides, strict=True):
        record += side != 2
        documents.add(
            np.arange(4, dtype=np.uint32), np.ones(4, np.uint8), file=0, record=record, side=side, hash=number
        )
    write_part(folder / "part", documents, vocab_size=9)
    index = Index.gather([folder / "part"], [0])
    packings = [one_a_row(len(hashes))]
    write_store(folder / "store", parts=[folder / "part"], files=["f"], index=index, packings=packings, seq_len=4)
    return Store.open(folder / "store")


def test_a_pair_is_one_record_and_what_was_counted_is_kept(tmp_path):
    train = store(tmp_path / "train", [2**63, 2**63, 7, 7], [1, 2, 0, 0])
    held = store(tmp_path / "held", [7, 8], [0, 0])
    assert record_hashes(train).tolist() == [2**63, 7, 7]
    kept = tmp_path / "kept" / "x.json"
    assert find_duplicates([train], {"held": held}, kept=kept) == Duplicates(1, {"held": 1})
    assert find_duplicates([], {}, kept=kept) == Duplicates(1, {"held": 1})
