"""How tokenised documents and packed rows lie on disk: folders of .npy arrays, written once, opened as memory maps.

Two kinds of folder. A *part* holds the documents of one shard of one source, whole. A *store* is what a rank opens: an
index of documents (slices of parts) and of the rows that packing made of them. Parts are shared: another `seq_len` or
another mix of sources makes a new store over the same parts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UserError

VERSION = 1
_PART_ARRAYS = ("tokens", "weights", "offsets", "file", "record", "trained", "weight")
_DOCUMENT_ARRAYS = ("part", "start", "length", "file", "record")
_ROW_ARRAYS = ("row_offsets", "row_documents", "row_tokens", "row_cost", "row_weight")


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a row.

    tokens: [length] uint32
    weights: [length] float32, how much each token counts as a target; 0 is not trained
    source: path of the file (or id of the hub dataset) it comes from
    record: index of the record in that file, from 0
    """

    tokens: NDArray[np.uint32]
    weights: NDArray[np.float32]
    source: str
    record: int


@dataclass(slots=True)
class Encoded:
    """Documents on their way to a part, in order of arrival.

    tokens, weights: one array a document, same lengths
    files: index into the source's list of files
    records: index of the record in its file, from 0
    """

    tokens: list[NDArray[Any]] = field(default_factory=list)
    weights: list[NDArray[Any]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)

    def add(self, tokens: NDArray[Any], weights: NDArray[Any], *, file: int, record: int) -> None:
        """Append one document."""
        self.tokens.append(tokens)
        self.weights.append(weights)
        self.files.append(file)
        self.records.append(record)


def count_targets(weights: NDArray[Any]) -> tuple[int, float]:
    """Trained targets of a document and the sum of their weights; the first token follows nothing and is no target."""
    return int(np.count_nonzero(weights[1:])), float(weights[1:].sum(dtype=np.float64))


def write_part(path: Path, documents: Encoded, *, vocab_size: int, meta: Mapping[str, Any] | None = None) -> None:
    """Write one shard's documents; `path` appears whole or not at all."""
    weights = np.concatenate(documents.weights) if documents.weights else np.zeros(0, np.uint8)
    whole = bool(np.all(weights == weights.astype(np.uint8)))
    tokens = np.concatenate(documents.tokens) if documents.tokens else np.zeros(0, np.uint32)
    targets = [count_targets(w) for w in documents.weights]
    arrays = {
        "tokens": tokens.astype(np.uint16 if vocab_size <= 65536 else np.uint32),
        "weights": weights.astype(np.uint8 if whole else np.float32),
        "offsets": np.cumsum([0, *(len(t) for t in documents.tokens)], dtype=np.int64),
        "file": np.array(documents.files, dtype=np.int32),
        "record": np.array(documents.records, dtype=np.int32),
        "trained": np.array([count for count, _ in targets], dtype=np.int32),
        "weight": np.array([weight for _, weight in targets], dtype=np.float64),
    }
    _write_folder(path, arrays, "part.json", dict(meta or {}))


@dataclass(slots=True)
class Index:
    """Which slice of which part each document is; what `write_store` keeps.

    part: [documents] int32, index into the store's list of parts
    start: [documents] int64, first token in that part
    length: [documents] int32, tokens
    file: [documents] int32, index into the store's list of files
    record: [documents] int32, index of the record in its file, from 0
    trained: [documents] int32, targets of a weight above 0
    weight: [documents] float64, sum of those weights
    """

    part: NDArray[np.int32]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    file: NDArray[np.int32]
    record: NDArray[np.int32]
    trained: NDArray[np.int32]
    weight: NDArray[np.float64]


def write_store(
    path: Path,
    *,
    parts: Sequence[Path],
    files: Sequence[str],
    index: Index,
    row_offsets: NDArray[np.int64],
    row_documents: NDArray[Any],
    seq_len: int,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write the index of documents and rows; `path` appears whole or not at all.

    Args:
        parts: folders made by `write_part`; kept relative, so that the cache folder can be moved.
        row_offsets: [rows + 1], where each row begins in `row_documents`.
        row_documents: document ids of all rows, laid end to end; a document may occur in several rows.
    """
    lengths = index.length[row_documents].astype(np.int64)
    starts = row_offsets[:-1]
    documents = index.length.size
    arrays: dict[str, NDArray[Any]] = {
        "part": index.part,
        "start": index.start,
        "length": index.length,
        "file": index.file,
        "record": index.record,
        "row_offsets": row_offsets,
        "row_documents": row_documents.astype(np.uint32 if documents < 2**32 else np.int64),
        "row_tokens": np.add.reduceat(lengths, starts) if starts.size else np.zeros(0, np.int64),
        "row_cost": np.add.reduceat(lengths**2, starts) if starts.size else np.zeros(0, np.int64),
        "row_weight": np.add.reduceat(index.weight[row_documents], starts) if starts.size else np.zeros(0),
    }
    tokens, rows = int(lengths.sum()), int(starts.size)
    manifest = {
        "version": VERSION,
        "rows": rows,
        "documents": int(row_documents.size),
        "tokens": tokens,
        "trained_tokens": int(index.trained[row_documents].sum(dtype=np.int64)),
        "trained_weight": float(arrays["row_weight"].sum()),
        "packing_efficiency": tokens / (rows * seq_len) if rows else 0.0,
        "seq_len": seq_len,
        "parts": [os.path.relpath(part, path) for part in parts],
        "files": list(files),
        **(meta or {}),
    }
    _write_folder(path, arrays, "store.json", manifest)


class Store:
    """Rows and documents of one store, read on demand; opening costs the same for ten rows and for a thousand million.

    row_tokens: [rows] int64, tokens of each row
    row_cost: [rows] int64, sum of the squared document lengths, which is what attention costs
    row_weight: [rows] float64, sum of the weights of trained targets
    """

    def __init__(self, path: Path, manifest: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self.manifest = manifest
        self.rows: int = manifest["rows"]
        self.row_tokens = arrays["row_tokens"]
        self.row_cost = arrays["row_cost"]
        self.row_weight = arrays["row_weight"]
        self._arrays = arrays
        self._parts: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}

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

    def row_documents(self, row: int) -> NDArray[np.int64]:
        """Ids of the documents of a row, in the order they lie in it."""
        begin, end = (int(x) for x in self._arrays["row_offsets"][row : row + 2])
        ids: NDArray[np.int64] = self._arrays["row_documents"][begin:end].astype(np.int64)
        return ids

    def document_length(self, document: int) -> int:
        """Tokens of one document."""
        return int(self._arrays["length"][document])

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
