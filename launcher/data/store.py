"""How tokenised documents and packed rows lie on disk: folders of .npy arrays, written once, opened as memory maps.

Two kinds of folder. A *part* holds the documents of one shard of one source, whole. A *store* is what a rank opens: an
index of documents (slices of parts) and of the rows that packing made of them, once or several times. Parts are shared:
another `seq_len` or another packing makes a new store over the same parts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.packing import Packing
from launcher.errors import UserError

VERSION = 2
_PART_ARRAYS = (
    "tokens", "weights", "offsets", "file", "record", "trained", "weight", "first", "side", "hash",
)  # fmt: skip
_MAPPED_BYTES = 8 << 20  # a column so small is read through its memory map wherever it is asked for
_ROW_ARRAYS = ("row_offsets", "row_documents", "row_tokens", "row_cost", "row_weight")


class Side(IntEnum):
    """What a document is to its record: plain, one of the two of a pair, or an answer labelled good or bad."""

    plain = 0
    chosen = 1
    rejected = 2
    good = 3
    bad = 4


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a row.

    tokens: [length] uint32
    weights: [length] float32, how much each token counts as a target; 0 is not trained
    source: path of the file (or id of the hub dataset) it comes from
    record: index of the record in that file, from 0
    side: a `Side`
    """

    tokens: NDArray[np.uint32]
    weights: NDArray[np.float32]
    source: str
    record: int
    side: int = Side.plain


@dataclass(slots=True)
class Encoded:
    """Documents on their way to a part, in order of arrival; the two of a pair follow one another.

    tokens, weights: one array a document, same lengths
    files: index into the source's list of files
    records: index of the record in its file, from 0
    sides: a `Side` each
    hashes: xxh3_64 of the record's text
    """

    tokens: list[NDArray[Any]] = field(default_factory=list)
    weights: list[NDArray[Any]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def add(
        self, tokens: NDArray[Any], weights: NDArray[Any], *, file: int, record: int, side: int = 0, hash: int = 0
    ) -> None:  # fmt: skip
        """Append one document."""
        self.tokens.append(tokens)
        self.weights.append(weights)
        self.files.append(file)
        self.records.append(record)
        self.sides.append(side)
        self.hashes.append(hash)


@dataclass(frozen=True, slots=True)
class Targets:
    """What is trained of each document.

    A document's first token follows nothing, so it is a target only where documents are not isolated; it is apart.

    trained: [documents] int32, targets of a weight above 0, the first token left out
    weight: [documents] float64, sum of those weights
    first: [documents] float32, weight of the first token
    """

    trained: NDArray[np.int32]
    weight: NDArray[np.float64]
    first: NDArray[np.float32]


def count_targets(weights: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[Any]) -> Targets:
    """Targets of documents that lie in one array of weights, each from its start on."""
    result = Targets(
        np.zeros(starts.size, np.int32), np.zeros(starts.size, np.float64), np.zeros(starts.size, np.float32)
    )
    result.first[lengths > 0] = weights[starts[lengths > 0]]
    more = np.flatnonzero(lengths > 1)
    more = more[
        np.argsort(starts[more], kind="stable")
    ]  # what lies between two documents is summed, too, and thrown away
    spans = np.stack([starts[more] + 1, starts[more] + lengths[more]], axis=1).ravel()
    if spans.size:
        values = np.append(weights, weights[:1])  # the last document may end where the array does
        result.trained[more] = np.add.reduceat(values != 0, spans, dtype=np.int32)[::2]
        result.weight[more] = np.add.reduceat(values, spans, dtype=np.float64)[::2]
    return result


def write_part(path: Path, documents: Encoded, *, vocab_size: int, meta: Mapping[str, Any] | None = None) -> None:
    """Write one shard's documents; `path` appears whole or not at all."""
    weights = np.concatenate(documents.weights) if documents.weights else np.zeros(0, np.uint8)
    if weights.dtype != np.uint8:
        whole = weights.astype(np.uint8)
        weights = whole if np.array_equal(weights, whole) else weights.astype(np.float32, copy=False)
    tokens = np.concatenate(documents.tokens) if documents.tokens else np.zeros(0, np.uint32)
    offsets = np.zeros(len(documents.tokens) + 1, dtype=np.int64)
    np.cumsum([len(t) for t in documents.tokens], out=offsets[1:])
    targets = count_targets(weights, offsets[:-1], np.diff(offsets))
    arrays = {
        "tokens": tokens.astype(np.uint16 if vocab_size <= 65536 else np.uint32, copy=False),
        "weights": weights,
        "offsets": offsets,
        "file": np.array(documents.files, dtype=np.int32),
        "record": np.array(documents.records, dtype=np.int32),
        "trained": targets.trained,
        "weight": targets.weight,
        "first": targets.first,
        "side": np.array(documents.sides, dtype=np.uint8),
        "hash": np.array(documents.hashes, dtype=np.uint64),
    }
    _write_folder(path, arrays, "part.json", dict(meta or {}))


@dataclass(slots=True)
class Index:
    """Which slice of which part each document is; what `write_store` keeps. A cut document lies here in its pieces.

    part: [documents] int32, index into the store's list of parts
    start: [documents] int64, first token in that part
    length: [documents] int32, tokens
    file: [documents] int32, index into the store's list of files
    record: [documents] int32, index of the record in its file, from 0
    trained: [documents] int32, targets of a weight above 0, the first token left out
    weight: [documents] float64, sum of those weights
    first: [documents] float32, weight of the first token
    side: [documents] uint8, a `Side` each
    hash: [documents] uint64, of the record's text
    """

    part: NDArray[np.int32]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    file: NDArray[np.int32]
    record: NDArray[np.int32]
    trained: NDArray[np.int32]
    weight: NDArray[np.float64]
    first: NDArray[np.float32]
    side: NDArray[np.uint8]
    hash: NDArray[np.uint64]

    @classmethod
    def gather(cls, parts: Sequence[Path], first_files: Sequence[int] | None = None) -> Index:
        """Every document of these parts, whole.

        Args:
            first_files: what to add to the file numbers of each part; None: nothing.
        """
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _DOCUMENT_ARRAYS}
        for number, folder in enumerate(parts):
            part = open_part(folder)
            columns["file"].append(np.asarray(part["file"]) + np.int32(first_files[number] if first_files else 0))
            columns["part"].append(np.full(part["record"].size, number, dtype=np.int32))
            columns["start"].append(np.asarray(part["offsets"][:-1]))
            columns["length"].append(np.diff(part["offsets"]).astype(np.int32))
            for name in _DOCUMENT_ARRAYS[4:]:
                columns[name].append(np.asarray(part[name]))
        return cls(**{name: np.concatenate(arrays) for name, arrays in columns.items()})

    def take(self, which: NDArray[Any]) -> Index:
        """Some of the documents, by mask or by number."""
        return Index(**{name: getattr(self, name)[which] for name in _DOCUMENT_ARRAYS})

    def whole(self) -> NDArray[np.bool_]:
        """Which entries count as a document: of the pieces of one, the first."""
        keys = (self.file, self.record, self.side)
        first = np.ones(self.part.size, dtype=bool)
        first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        return first


_DOCUMENT_ARRAYS = tuple(field.name for field in fields(Index))


def write_store(
    path: Path,
    *,
    parts: Sequence[Path],
    files: Sequence[str],
    index: Index,
    packings: Sequence[Packing],
    seq_len: int,
    isolate: bool = True,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write the index of documents and rows; `path` appears whole or not at all.

    Args:
        parts: folders made by `write_part`; kept relative, so that the cache folder can be moved.
        packings: rows of the same documents, packed once or several times; as many rows in each.
        isolate: documents of a row do not see one another; else a row is one segment and targets cross borders.
    """
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in _DOCUMENT_ARRAYS}
    for number, (offsets, documents) in enumerate(packings):
        laid = _row_arrays(index, offsets, documents, isolate=isolate)
        arrays |= {_numbered(name, number): array for name, array in laid.items()}
    offsets, documents = packings[0]
    rows, tokens = offsets.size - 1, int(arrays["row_tokens"].sum(dtype=np.int64))
    sides = np.bincount(index.side[documents][index.whole()[documents]], minlength=len(Side))
    trained = int(index.trained[documents].sum(dtype=np.int64))
    if not isolate:
        trained += int(np.count_nonzero(_inner_firsts(index, offsets, documents)))
    manifest = {
        "version": VERSION,
        "rows": rows,
        "documents": int(sides.sum()),
        "groups": {
            "plain": int(sides[Side.plain]),
            "pairs": int(sides[Side.chosen]),
            "labelled": int(sides[Side.good] + sides[Side.bad]),
        },
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_weight": float(arrays["row_weight"].sum()),
        "packing_efficiency": tokens / (rows * seq_len) if rows else 0.0,
        "seq_len": seq_len,
        "isolate": isolate,
        "repack": len(packings),
        "parts": [os.path.relpath(part, path) for part in parts],
        "files": list(files),
        **(meta or {}),
    }
    _write_folder(path, arrays, "store.json", manifest)


def _row_arrays(
    index: Index, offsets: NDArray[np.int64], documents: NDArray[Any], *, isolate: bool
) -> dict[str, NDArray[Any]]:  # fmt: skip
    lengths = index.length[documents].astype(np.int64)
    weights = index.weight[documents] if isolate else index.weight[documents] + _inner_firsts(index, offsets, documents)
    tokens = _sums(lengths, offsets)
    return {
        "row_offsets": offsets,
        "row_documents": documents.astype(np.uint32 if index.part.size < 2**32 else np.int64),
        "row_tokens": tokens,
        "row_cost": _sums(lengths**2, offsets) if isolate else tokens**2,
        "row_weight": _sums(weights, offsets),
    }


def _inner_firsts(index: Index, offsets: NDArray[np.int64], documents: NDArray[Any]) -> NDArray[np.float64]:
    """Weight of each document's first token where another one of the row comes before it, else 0."""
    firsts = index.first[documents].astype(np.float64)
    firsts[offsets[:-1]] = 0
    return firsts


def _sums(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """Sum over each row; no row is empty."""
    sums: NDArray[Any] = np.add.reduceat(values, offsets[:-1]) if offsets.size > 1 else values[:0]
    return sums


def _numbered(name: str, packing: int) -> str:
    return f"{name}-{packing}" if packing else name


class Store:
    """Rows and documents of one store, read on demand; opening costs the same for ten rows and for a thousand million.

    rows: of one packing
    packings: how many packings there are; this is number 0, `packing` gives the others
    isolate: whether documents of a row see nothing of one another
    row_tokens: [rows] int64, tokens of each row
    row_cost: [rows] int64, sum of the squared segment lengths, which is what attention costs
    row_weight: [rows] float64, sum of the weights of trained targets
    """

    def __init__(self, path: Path, manifest: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.packings: int = manifest["repack"]
        self.isolate: bool = manifest["isolate"]
        self.row_tokens = arrays["row_tokens"]
        self.row_cost = arrays["row_cost"]
        self.row_weight = arrays["row_weight"]
        self._arrays = arrays
        self._parts: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        self._packings: dict[int, Store] = {0: self}

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open a store that `prepare` made.

        Raises:
            UserError: no store lies there, or one of another version.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / "store.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no data store lies here. Run `launcher prepare` on the recipe again.") from None
        if manifest["version"] != VERSION:
            raise UserError(f"{path}: a store of version {manifest['version']}, expected {VERSION}. Prepare it again.")
        return cls(path, manifest, {name: _open(path / f"{name}.npy") for name in (*_DOCUMENT_ARRAYS, *_ROW_ARRAYS)})

    def packing(self, number: int) -> Store:
        """The same documents in the rows of packing `number` modulo `packings`; opened on first use."""
        number %= self.packings
        if number not in self._packings:
            rows = {name: _open(self.path / f"{_numbered(name, number)}.npy") for name in _ROW_ARRAYS}
            view = Store(self.path, self.manifest, {**self._arrays, **rows})
            view._parts, view._packings = self._parts, self._packings
            self._packings[number] = view
        return self._packings[number]

    @property
    def index(self) -> Index:
        """Every document at once, as memory maps; for statistics and comparisons of whole stores."""
        return Index(**{name: self._arrays[name] for name in _DOCUMENT_ARRAYS})

    @property
    def num_documents(self) -> int:
        """Entries of the index; a document that was cut has one for each piece."""
        return int(self._arrays["length"].size)

    def row_documents(self, row: int) -> NDArray[np.int64]:
        """Ids of the documents of a row, in the order they lie in it."""
        begin, end = (int(x) for x in self._arrays["row_offsets"][row : row + 2])
        ids: NDArray[np.int64] = self._arrays["row_documents"][begin:end].astype(np.int64)
        return ids

    def document_lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each document."""
        lengths: NDArray[np.int64] = self._arrays["length"][documents].astype(np.int64)
        return lengths

    def document(self, document: int) -> Document:
        """One document's tokens and weights, and where it comes from."""
        arrays = self._arrays
        tokens, weights = self._part(int(arrays["part"][document]))
        start = int(arrays["start"][document])
        span = slice(start, start + int(arrays["length"][document]))
        return Document(
            tokens=tokens[span].astype(np.uint32, copy=False),
            weights=weights[span].astype(np.float32, copy=False),
            source=self.manifest["files"][int(arrays["file"][document])],
            record=int(arrays["record"][document]),
            side=int(arrays["side"][document]),
        )

    def documents(self, row: int) -> Iterator[Document]:
        """The documents of a row."""
        return (self.document(int(d)) for d in self.row_documents(row))

    def _part(self, part: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if part not in self._parts:
            folder = self.path / self.manifest["parts"][part]
            try:
                self._parts[part] = (_open(folder / "tokens.npy"), _open(folder / "weights.npy"))
            except FileNotFoundError:
                raise UserError(f"{folder}: missing, but {self.path} needs it. Prepare the data again.") from None
        return self._parts[part]


def open_part(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a part, as `write_part` laid them."""
    return {name: _open(folder / f"{name}.npy") for name in _PART_ARRAYS}


def gather(values: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """Some values of a column of a store, wherever they lie in it.

    From a large file each is read by itself: through a memory map, Linux would bring 16 pages into memory for it.
    """
    if not isinstance(values, np.memmap) or values.nbytes <= _MAPPED_BYTES:
        return np.asarray(values[index])
    size, first = values.itemsize, values.offset
    with open(str(values.filename), "rb", buffering=0) as f:
        read = [os.pread(f.fileno(), size, first + at) for at in (index * size).tolist()]
    return np.frombuffer(b"".join(read), dtype=values.dtype)


def _open(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _write_folder(path: Path, arrays: Mapping[str, NDArray[Any]], name: str, manifest: Mapping[str, Any]) -> None:
    """Arrays and a JSON manifest into a fresh folder, all fsynced, then one rename."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for array_name, array in arrays.items():
        with open(fresh / f"{array_name}.npy", "wb") as f:
            whole = np.ascontiguousarray(array)
            np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(whole))
            f.write(whole.data)  # np.save would hide why a write failed, as that the disk is full
            _sync(f)
    with open(fresh / name, "w") as text:
        json.dump(manifest, text, indent=1)
        _sync(text)
    sync_folder(fresh)
    try:
        os.rename(fresh, path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(fresh)  # somebody else made the same content first
    sync_folder(path.parent)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
