"""Rows hold every token that was not counted as lost: once, with pairs together, and targets where they belong."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.rows import Held, build_rows
from launcher.data.store import Encoded, Side, Store, write_part, write_store
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
