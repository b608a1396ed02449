"""What a rank reads of a store at its start: a few values of large columns, and no row of another rank."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.data import store
from launcher.data.batches import Batches
from launcher.data.mix import Mix
from launcher.data.store import Store, gather
from tests.data.make import tiny_store


@pytest.mark.parametrize("kind", [np.int64, np.float64, np.uint32, np.uint8])
def test_values_that_are_read_one_by_one_are_those_of_the_column(tmp_path, monkeypatch, kind):
    values = np.arange(5000).astype(kind)
    np.save(tmp_path / "column.npy", values)
    monkeypatch.setattr(store, "_MAPPED_BYTES", 0)
    column = np.load(tmp_path / "column.npy", mmap_mode="r")
    index = np.random.default_rng(0).integers(0, 5000, 300)
    for some in (index, index[:1], index[:0]):
        found = gather(column, some)
        assert found.dtype == kind
        assert np.array_equal(found, values[some])


def test_one_of_4096_ranks_reads_its_own_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MAPPED_BYTES", 0)
    opened = Store.open(tiny_store(tmp_path, [8] * 4096, packing="none"))
    read: list[int] = []
    right = Mix.document
    monkeypatch.setattr(Mix, "document", lambda self, document: read.append(document) or right(self, document))

    def share(rank: int) -> list[int]:
        batches = Batches(
            opened, seed=3, global_batch_size=4096, micro_batch_size=1, world_size=4096, rank=rank, total_steps=9
        )
        return [row for micro in batches.step(5).micro for row in micro.rows]

    (mine,) = share(17)
    assert len(read) == 1
    (other,) = share(4000)
    assert mine != other
    assert len(read) == 2
