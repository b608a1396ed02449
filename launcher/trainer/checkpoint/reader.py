"""Whether a checkpoint folder can be trusted, and random access to what it holds. Knows no engine and no process group.

Chain of trust: the marker holds the hash of the manifest, the manifest those of the files, each file's header says
whose it is. A flipped bit anywhere is therefore found, and a file that stands in another's place is called by its name.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from launcher.run.directory import MARKER, parse_checkpoint_name
from launcher.trainer.checkpoint.format import CHUNK, DTYPES, CheckpointError, read_header

MANIFEST, VERSION = "manifest.json", 1
_TYPES = {code: dtype for dtype, code in DTYPES.items()}
_CODES = list(_TYPES)

Manifest = dict[str, Any]
Table = NDArray[np.int64]  # one row a range; columns below
PARAM, KIND, START, LENGTH, FILE, OFFSET, TYPE = range(7)


def marker_text(manifest: bytes) -> str:
    """What the marker of this manifest holds."""
    return f"xxh3-128 {xxhash.xxh3_128_hexdigest(manifest)}\n"


def read_manifest(folder: Path, *, run_id: str | None = None) -> Manifest:
    """The manifest, proven to be the one that was committed here.

    Args:
        run_id: the run that the checkpoint must belong to; None: any
    Raises:
        CheckpointError: marker or manifest is missing, changed, of a newer version, or of another checkpoint.
    """
    try:
        marker = (folder / MARKER).read_bytes()
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder.name}: {Path(error.filename).name}: {error.strerror}") from error
    if marker != marker_text(text).encode():
        raise CheckpointError(f"{folder.name}: {MANIFEST} is not the one that {MARKER} vouches for")
    manifest: Manifest = json.loads(text)
    if manifest["version"] != VERSION:
        raise CheckpointError(f"{folder.name}: format version {manifest['version']}; this launcher reads {VERSION}")
    if parse_checkpoint_name(folder.name) not in ((manifest["step"], manifest["attempt"]), None):
        owner = f"step {manifest['step']}, attempt {manifest['attempt']}"
        raise CheckpointError(f"{folder.name}: {MANIFEST} is that of {owner}")
    if run_id is not None and manifest["run_id"] != run_id:
        raise CheckpointError(f"{folder.name}: belongs to run {manifest['run_id']}, not to {run_id}")
    return manifest


def header_metadata(manifest: Manifest, rank: int) -> dict[str, str]:
    """What the header of a rank's file says of itself."""
    return {
        "format": "pt", "launcher_checkpoint": str(VERSION), "run_id": manifest["run_id"],
        "step": str(manifest["step"]), "attempt": str(manifest["attempt"]), "rank": str(rank),
    }  # fmt: skip


def all_files(manifest: Manifest) -> list[dict[str, Any]]:
    """Every file of a checkpoint: one for each rank, then those that hold lanes of a stream."""
    return [{"rank": rank, **record} for rank, record in enumerate(manifest["files"])] + manifest.get("stream", [])


def verify_files(folder: Path, manifest: Manifest, numbers: Iterable[int]) -> list[str]:
    """Read and hash these of `all_files`; one sentence for each that is not what the manifest says."""
    records = all_files(manifest)
    return [problem for number in numbers if (problem := _verify_file(folder, manifest, records[number]))]


def _verify_file(folder: Path, manifest: Manifest, record: dict[str, Any]) -> str | None:
    rank = record["rank"]
    path, digest, size = folder / record["file"], xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:  # not mapped: a bad disk then raises, and does not kill the process
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        return f"{folder.name}/{path.name}: {error.strerror}"
    if size == record["bytes"] and digest.hexdigest() == record["xxh3_128"]:
        return None
    if other := _other_owner(path, manifest, rank):
        return f"{folder.name}/{path.name}: is {other}"
    if size != record["bytes"]:
        return f"{folder.name}/{path.name}: {size} bytes, the manifest says {record['bytes']}"
    hashes = f"xxh3-128 {digest.hexdigest()}, the manifest says {record['xxh3_128']}"
    return f"{folder.name}/{path.name}: its content has changed ({hashes})"


def _other_owner(path: Path, manifest: Manifest, rank: int) -> str | None:
    try:
        _, found, _ = read_header(path)
    except (OSError, ValueError):
        return None
    expected = header_metadata(manifest, rank)
    keys = ("rank", "step", "attempt", "run_id")
    if any(not isinstance(found.get(key), str) for key in keys) or all(found[key] == expected[key] for key in keys):
        return None
    return "the file of " + ", ".join(f"{key.replace('_', ' ')} {found[key]}" for key in keys)


def read_table(folder: Path, manifest: Manifest) -> Table:
    """Where each range lies, from the headers of all files; sorted by parameter, kind and start.

    Raises:
        CheckpointError: a header is unreadable or of another checkpoint, a file is too many, or some element of some
            parameter is not there exactly once. All problems are named.
    """
    names = {name: i for i, name in enumerate(manifest["params"])}
    kinds = {kind: i for i, kind in enumerate(manifest["kinds"])}
    rows, problems = [], _strangers(folder, manifest)
    for rank, record in enumerate(manifest["files"]):
        place = f"{folder.name}/{record['file']}"
        try:
            header, metadata, base = read_header(folder / record["file"])
        except (OSError, ValueError) as error:
            problems.append(f"{place}: {getattr(error, 'strerror', None) or error}")
            continue
        if metadata != header_metadata(manifest, rank):
            owner = _other_owner(folder / record["file"], manifest, rank)
            problems.append(f"{place}: is {owner or 'not of this checkpoint'}")
            continue
        for key, spot in header.items():
            name, kind, start = key.rsplit("|", 2)
            if name not in names or kind not in kinds:
                problems.append(f"{place}: holds {name} {kind}, which the manifest does not know")
                continue
            offset, code = base + spot["data_offsets"][0], _CODES.index(spot["dtype"])
            rows.append((names[name], kinds[kind], int(start), spot["shape"][0], rank, offset, code))
    table: Table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    table = table[np.lexsort((table[:, START], table[:, KIND], table[:, PARAM]))]
    problems = problems or [f"{folder.name}: {gap}" for gap in _gaps(table, manifest)]
    if problems:
        raise CheckpointError("\n".join(problems))
    return table


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    known = {record["file"] for record in all_files(manifest)}
    written = (path.name for pattern in ("rank-*", "stream-*") for path in folder.glob(pattern))
    found = sorted(name for name in written if name not in known)
    return [f"{folder.name}/{name}: does not belong to this checkpoint" for name in found]


def expected_ranges(manifest: Manifest) -> dict[tuple[str, str], int]:
    """{(name, kind): number of elements} the files must hold: all values, and all moments of trained parameters."""
    return {
        (name, kind): math.prod(entry["shape"])
        for name, entry in manifest["params"].items()
        for kind in manifest["kinds"]
        if kind == "value" or entry["trainable"]
    }


def _gaps(table: Table, manifest: Manifest) -> list[str]:
    """Ranges that leave something out or hold it twice."""
    problems, groups = [], group_rows(table, manifest)
    for (name, kind), numel in expected_ranges(manifest).items():
        first, end = groups.get((name, kind), (0, 0))
        starts, lengths = table[first:end, START], table[first:end, LENGTH]
        ends = starts + lengths
        at = np.concatenate(([0], ends))
        if not np.array_equal(at[:-1], starts) or at[-1] != numel:
            wrong = np.flatnonzero(at != np.concatenate((starts, [numel])))[0]
            problems.append(f"{name} {kind}: elements from {at[wrong]} on are missing or there twice (of {numel})")
    return problems


def group_rows(table: Table, manifest: Manifest) -> dict[tuple[str, str], tuple[int, int]]:
    """{(name, kind): (first row, end row)} of a sorted table."""
    names, kinds = list(manifest["params"]), list(manifest["kinds"])
    keys = table[:, PARAM] * len(kinds) + table[:, KIND]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(firsts[1:], len(keys))
    return {
        (names[table[first, PARAM]], kinds[table[first, KIND]]): (int(first), int(end))
        for first, end in zip(firsts, ends, strict=True)
    }


class Reader:
    """Reads the ranges asked for and no other bytes, through memory maps of the files that hold them.

    Args:
        table: from `read_table`, here or on another rank; None: read it now
    """

    def __init__(self, folder: Path, manifest: Manifest, table: Table | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.table = read_table(folder, manifest) if table is None else table
        self._groups = group_rows(self.table, manifest)
        self._maps: dict[int, mmap.mmap] = {}

    def open_all(self) -> None:
        """Hold every file open, so that nobody's clean-up can take them away while they are read.

        Raises:
            OSError: one is gone already.
        """
        for index in range(len(self.manifest["files"])):
            self._map(index)

    def dtype(self, name: str, kind: str = "value") -> torch.dtype:
        """Type in which this is stored."""
        return _TYPES[_CODES[int(self.table[self._groups[name, kind][0], TYPE])]]

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + len(out)) of the flattened tensor, converted to its type.

        Raises:
            CheckpointError: the checkpoint does not hold them.
        """
        if not out.numel():
            return
        first, last = self._groups.get((name, kind), (0, 0))
        rows = self.table[first:last]
        at, end = start, start + out.numel()
        if not len(rows) or end > rows[-1, START] + rows[-1, LENGTH]:
            raise CheckpointError(f"{self.folder.name}: holds no {name} {kind}[{start}:{end}]")
        index = int(np.searchsorted(rows[:, START], start, side="right")) - 1
        while at < end:
            _, _, begin, length, file, offset, code = (int(x) for x in rows[index])
            count, dtype = min(end, begin + length) - at, _TYPES[_CODES[code]]
            offset += (at - begin) * dtype.itemsize
            part = torch.frombuffer(self._map(file), dtype=dtype, count=count, offset=offset)
            out[at - start : at - start + count].copy_(part)
            at, index = at + count, index + 1

    def read(self, name: str, kind: str = "value") -> Tensor:
        """The whole tensor in its shape and stored type; memory of its own."""
        out = torch.empty(self.manifest["params"][name]["shape"], dtype=self.dtype(name, kind))
        self.read_into(name, kind, 0, out.view(-1))
        return out

    def _map(self, index: int) -> mmap.mmap:
        if index not in self._maps:
            with open(self.folder / self.manifest["files"][index]["file"], "rb") as file:
                self._maps[index] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants writable memory
        return self._maps[index]
