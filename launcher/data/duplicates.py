"""Which records occur twice: within the training sources, and in training and evaluation at once.

Records are compared by the hash of their text, which the stores hold. Stores never change, so what was counted once is
kept beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.store import Store
from launcher.run.files import write_atomic

_AT_ONCE = 1 << 26  # hashes that are sorted at once (0.5 GB); more are taken in slices of their range


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Exact duplicates.

    within: training records whose text an earlier one has already
    leaked: evaluation records that are in the training data, too, by set
    """

    within: int = 0
    leaked: dict[str, int] = field(default_factory=dict)


def find_duplicates(train: Sequence[Store], sets: Mapping[str, Store], *, kept: Path) -> Duplicates:
    """Count duplicates, or take what was counted before.

    Args:
        sets: evaluation stores by name.
        kept: file of the result; its name tells the stores.
    """
    if kept.is_file():
        return Duplicates(**json.loads(kept.read_text()))
    found = count([record_hashes(store) for store in train], {n: record_hashes(store) for n, store in sets.items()})
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps(asdict(found)) + "\n")
    return found


def count(train: Sequence[NDArray[np.uint64]], sets: Mapping[str, NDArray[np.uint64]]) -> Duplicates:
    """Count duplicates among hashes of records."""
    within, leaked = 0, dict.fromkeys(sets, 0)
    slices = max(1, -(-sum(hashes.size for hashes in train) // _AT_ONCE))
    edges = [(i << 64) // slices for i in range(slices + 1)]
    for low, high in pairwise(edges):
        here = np.sort(np.concatenate([_between(hashes, low, high) for hashes in train]))
        within += int(np.count_nonzero(here[1:] == here[:-1]))
        for name, hashes in sets.items():
            asked = _between(hashes, low, high)
            at = np.searchsorted(here, asked)
            inside = at < here.size
            leaked[name] += int(np.count_nonzero(here[at[inside]] == asked[inside]))
    return Duplicates(within, leaked)


def record_hashes(store: Store) -> NDArray[np.uint64]:
    """One hash a record; a record may lie in several documents and pieces, which follow one another."""
    index = store.index
    first = np.ones(index.hash.size, dtype=bool)
    first[1:] = (index.record[1:] != index.record[:-1]) | (index.file[1:] != index.file[:-1])
    hashes: NDArray[np.uint64] = index.hash[first]
    return hashes


def _between(hashes: NDArray[np.uint64], low: int, high: int) -> NDArray[Any]:
    if (low, high) == (0, 1 << 64):
        return hashes
    return hashes[(hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))]
