"""From tokenised parts to rows: what is held out, repeated, cut or dropped, and which documents share a row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.data.order import uniform_hash
from launcher.data.packing import one_a_row, pack
from launcher.data.sources import place
from launcher.data.store import Index, count_targets, open_part
from launcher.errors import UserError
from launcher.recipe.schema import Recipe

_REPEAT_SEED = 0x5EED  # a weight of 0.5 takes the same half in every run


class Held(Enum):
    """Which share of the records: all, those not held out for evaluation, or those held out."""

    all = "all"
    rest = "rest"
    held = "held"


@dataclass(slots=True)
class Rows:
    """What a store is written from, with what was lost on the way, by reason.

    dropped: documents left out; changed: documents cut
    first: reason -> the first file and record it befell
    """

    index: Index
    row_offsets: NDArray[np.int64]
    row_documents: NDArray[np.int64]
    dropped: Counter[str]
    changed: Counter[str]
    first: dict[str, str]


@dataclass(slots=True)
class _Documents:
    """Columns of an `Index` under construction, with the source each document is of."""

    part: NDArray[Any]
    start: NDArray[Any]
    length: NDArray[Any]
    file: NDArray[Any]
    record: NDArray[Any]
    trained: NDArray[Any]
    weight: NDArray[Any]
    first: NDArray[Any]
    side: NDArray[Any]
    hash: NDArray[Any]
    source: NDArray[Any]

    def take(self, which: NDArray[Any]) -> _Documents:
        return _Documents(*(getattr(self, name)[which] for name in self.__slots__))

    def index(self) -> Index:
        return Index(
            part=self.part.astype(np.int32), start=self.start.astype(np.int64), length=self.length.astype(np.int32),
            file=self.file.astype(np.int32), record=self.record.astype(np.int32), trained=self.trained.astype(np.int32),
            weight=self.weight.astype(np.float64), first=self.first, side=self.side, hash=self.hash,
        )  # fmt: skip


@dataclass(slots=True)
class _Losses:
    names: list[str]
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, which: Counter[str], reason: str, documents: _Documents) -> None:
        if documents.part.size:
            which[reason] += int(documents.part.size)
            self.first.setdefault(reason, place(self.names[int(documents.file[0])], int(documents.record[0])))


def build_rows(
    parts: list[list[Path]], names: list[list[str]], weights: list[float], *, held: Held, recipe: Recipe
) -> Rows:
    """Gather the documents of all sources and lay them into rows.

    Args:
        parts: each source's part folders.
        names: each source's file names.
        weights: how often each source's records are seen in one epoch.
    Raises:
        UserError: a document is longer than data.seq_len under `overlong: error`; names file and record.
    """
    data = recipe.data
    losses = _Losses([name for source in names for name in source])
    documents = _gather(parts, names)
    if held != Held.all and documents.part.size:
        out = _held_out(documents, losses.names, seed=recipe.train.seed, fraction=data.eval_fraction)
        documents = documents.take(out if held == Held.held else ~out)
    folders = [part for source in parts for part in source]
    documents = _fit(documents, folders, seq_len=data.seq_len, overlong=data.overlong, losses=losses)
    repeats = _repeats(documents, losses.names, np.array(weights if held != Held.held else [1.0] * len(weights)))
    instances = np.repeat(np.arange(documents.part.size), repeats)
    lengths = documents.length[instances]
    offsets, order = pack(lengths, data.seq_len) if data.packing == "best_fit" else one_a_row(instances.size)
    return Rows(documents.index(), offsets, instances[order], losses.dropped, losses.changed, losses.first)


def _gather(parts: list[list[Path]], names: list[list[str]]) -> _Documents:
    """Every document of every part; files numbered over all sources."""
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _Documents.__slots__}
    number, first_file = 0, 0
    for source, folders in enumerate(parts):
        for folder in folders:
            part = open_part(folder)
            count = part["record"].size
            columns["part"].append(np.full(count, number))
            columns["start"].append(np.asarray(part["offsets"][:-1]))
            columns["length"].append(np.diff(part["offsets"]))
            columns["file"].append(part["file"] + first_file)
            for name in ("record", "trained", "weight", "first", "side", "hash"):
                columns[name].append(np.asarray(part[name]))
            columns["source"].append(np.full(count, source))
            number += 1
        first_file += len(names[source])
    return _Documents(**{name: np.concatenate(arrays) for name, arrays in columns.items()})


def _held_out(documents: _Documents, names: list[str], *, seed: int, fraction: float) -> NDArray[np.bool_]:
    """Which documents are for evaluation; at least one where there are two."""
    chance = _chance(documents, names, seed=seed)
    return (chance < fraction) | (chance == chance.min()) & (chance.size > 1)


def _repeats(documents: _Documents, names: list[str], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """How often each document is seen: the whole part of its source's weight, and once more for a fixed share."""
    weight = weights[documents.source]
    whole = np.floor(weight)
    return (whole + (_chance(documents, names, seed=_REPEAT_SEED) < weight - whole)).astype(np.int64)


def _chance(documents: _Documents, names: list[str], *, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each document, from the name of its file and its record there alone.

    So it stays what it is when records are appended, or files and sources are added.
    """
    files = np.array([xxhash.xxh3_64_intdigest(Path(name).name.encode()) >> 1 for name in names], dtype=np.int64)
    return uniform_hash(seed, files[documents.file], documents.record)


def _fit(
    documents: _Documents, folders: list[Path], *, seq_len: int, overlong: str, losses: _Losses
) -> _Documents:  # fmt: skip
    """Documents of at most `seq_len` tokens, as `overlong` says, without those that then teach nothing."""
    long = documents.length > seq_len
    if not long.any():
        return documents
    if overlong == "error":
        _refuse(documents.take(long), seq_len, losses.names)
    if overlong == "drop":
        losses.count(losses.dropped, "longer than seq_len", documents.take(long))
        return documents.take(~long)
    reason = "truncated to seq_len" if overlong == "truncate" else "split at seq_len"
    losses.count(losses.changed, reason, documents.take(long))
    cut = _cut(documents, long, folders, seq_len=seq_len, whole=overlong == "split")
    taught = cut.trained > 0
    losses.count(losses.dropped, f"no trained token left when {reason}", cut.take(~taught))
    return cut.take(taught)


def _cut(
    documents: _Documents, long: NDArray[np.bool_], folders: list[Path], *, seq_len: int, whole: bool
) -> _Documents:
    """Each long document as its first `seq_len` tokens, or as all its pieces of that length; targets counted anew."""
    pieces = np.where(long & whole, -(-documents.length // seq_len), 1)
    origin = np.repeat(np.arange(pieces.size), pieces)
    number = np.arange(origin.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = documents.take(origin)
    cut.start = cut.start + number * seq_len
    cut.length = np.minimum(cut.length - number * seq_len, seq_len)
    opened: tuple[int, NDArray[Any]] = (-1, np.zeros(0))
    for i in np.flatnonzero(long[origin]).tolist():
        if opened[0] != cut.part[i]:
            opened = (int(cut.part[i]), open_part(folders[int(cut.part[i])])["weights"])
        targets = count_targets(
            opened[1][cut.start[i] : cut.start[i] + cut.length[i]], np.array([0, cut.length[i]], dtype=np.int64)
        )
        cut.trained[i], cut.weight[i] = targets.trained[0], targets.weight[0]
        cut.first[i] = targets.first[0]
    return cut


def _refuse(long: _Documents, seq_len: int, names: list[str]) -> None:
    shown = [
        f"  {place(names[int(file)], int(record))}: {length} tokens"
        for file, record, length in zip(long.file[:5], long.record[:5], long.length[:5], strict=True)
    ]
    more = [f"  and {long.part.size - 5} more"] if long.part.size > 5 else []
    raise UserError(
        "\n".join(
            [
                f"data.seq_len = {seq_len}: {long.part.size} records are longer, the longest has "
                f"{int(long.length.max())} tokens. Raise data.seq_len, or set data.overlong to drop, truncate "
                f"or split.",
                *shown,
                *more,
            ]
        )
    )
