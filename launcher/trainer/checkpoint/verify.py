"""Whether a checkpoint folder can be trusted: its marker, its manifest, every byte of its files, every range. No torch.

Chain of trust: the marker holds the hash of the manifest, the manifest those of the files, each file's header says
whose it is. A flipped bit anywhere is therefore found, and a file that stands in another's place is called by its name.
Symbolic links are refused: a checkpoint lies in its run, and nothing else is read or deleted in its name.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.run.directory import MARKER, parse_checkpoint_name
from launcher.run.files import list_folder, retrying

MANIFEST, VERSION = "manifest.json", 1
CHUNK = 1 << 24  # bytes read or written, and hashed, at a time
CODES = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
THREADS = 4  # files hashed at the same time by one process: disks and not the hash are what is waited for

Manifest = dict[str, Any]
Table = NDArray[np.int64]  # one row a range; columns below
PARAM, KIND, START, LENGTH, FILE, OFFSET, TYPE = range(7)


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or cannot be trusted; the text names folder, file and reason."""


def problems(folder: Path, *, run_id: str | None = None, threads: int = THREADS) -> list[str]:
    """Everything that is wrong with a committed checkpoint, a sentence each; every byte is read and hashed once."""
    try:
        manifest = read_manifest(folder, run_id=run_id)
        numbers = range(len(all_files(manifest)))
        with ThreadPoolExecutor(max_workers=threads) as pool:
            found = [line for part in pool.map(lambda n: verify_files(folder, manifest, [n]), numbers) for line in part]
        if not found:
            read_table(folder, manifest)
    except CheckpointError as error:
        return str(error).splitlines()
    return found


def open_plain(path: Path) -> FileIO:
    """A file of a checkpoint, unbuffered; never what a symbolic link leads to.

    Raises:
        OSError: it cannot be opened; `why` says of it what it is.
    """
    return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def why(error: OSError) -> str:
    """What is wrong with a file, in a few words."""
    return "is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)


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
        if retrying(folder.is_symlink, what=folder):
            raise CheckpointError(f"{folder.name}: is a symbolic link; a checkpoint lies in its run")
    except OSError as error:
        raise CheckpointError(f"{folder.name}: {why(error)}") from error
    marker, text = (_read(folder, name) for name in (MARKER, MANIFEST))
    if marker != marker_text(text).encode():
        raise CheckpointError(f"{folder.name}: {MANIFEST} is not the one that {MARKER} vouches for")
    try:
        manifest: Manifest = json.loads(text)
        version = manifest["version"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder.name}: {MANIFEST} is no manifest") from None
    if version != VERSION:
        raise CheckpointError(f"{folder.name}: format version {version}; this launcher reads {VERSION}")
    _require_form(folder, manifest)
    if parse_checkpoint_name(folder.name) not in ((manifest["step"], manifest["attempt"]), None):
        owner = f"step {manifest['step']}, attempt {manifest['attempt']}"
        raise CheckpointError(f"{folder.name}: {MANIFEST} is that of {owner}")
    if run_id is not None and manifest["run_id"] != run_id:
        raise CheckpointError(f"{folder.name}: belongs to run {manifest['run_id']}, not to {run_id}")
    return manifest


def _read(folder: Path, name: str) -> bytes:
    def read() -> bytes:
        with open_plain(folder / name) as file:
            return file.read()

    try:
        return retrying(read, what=folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder.name}: {name}: {why(error)}") from error


def _require_form(folder: Path, manifest: Manifest) -> None:
    """Refuse a manifest that is not as this launcher writes it, above all one that names files elsewhere."""
    try:
        files = all_files(manifest)
        names = [record["file"] for record in files]
        good = all(
            record["file"] == os.path.basename(record["file"]) not in ("", ".", "..")
            and isinstance(record["bytes"], int)
            and isinstance(record["xxh3_128"], str)
            for record in files
        )
        good = good and len(set(names)) == len(names) and len(manifest["files"]) == manifest["world_size"]
        for entry in manifest["params"].values():
            good = good and all(isinstance(n, int) and n >= 0 for n in entry["shape"]) and "trainable" in entry
        good = good and all(key in manifest for key in ("kinds", "step", "attempt", "run_id", "trainer_state"))
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise CheckpointError(f"{folder.name}: {MANIFEST} does not describe a checkpoint of this format")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """(tensors by key, metadata, offset of the buffer in bytes) of one file, without reading the buffer.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not begin with a header.
    """

    def read() -> tuple[bytes, int]:
        with open_plain(path) as file:
            length_bytes = file.read(8)
            if len(length_bytes) < 8:
                raise ValueError("no header")
            (length,) = struct.unpack("<Q", length_bytes)
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("no header")
            return file.read(length), length

    text, length = retrying(read, what=path)
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("no header")
    metadata = header.pop("__metadata__", {})
    return header, metadata if isinstance(metadata, dict) else {}, 8 + length


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
    rank, path = record["rank"], folder / record["file"]
    try:
        size, digest = retrying(lambda: _hash(path), what=path)
    except OSError as error:
        return f"{folder.name}/{path.name}: {why(error)}"
    if size == record["bytes"] and digest == record["xxh3_128"]:
        return None
    if other := _other_owner(path, manifest, rank):
        return f"{folder.name}/{path.name}: is {other}"
    if size != record["bytes"]:
        return f"{folder.name}/{path.name}: {size} bytes, the manifest says {record['bytes']}"
    hashes = f"xxh3-128 {digest}, the manifest says {record['xxh3_128']}"
    return f"{folder.name}/{path.name}: its content has changed ({hashes})"


def _hash(path: Path) -> tuple[int, str]:
    """(bytes, xxh3-128) of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with open_plain(path) as file:  # not mapped: a bad disk then raises, and does not kill the process
        buffer = memoryview(bytearray(min(CHUNK, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


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
    rows = []
    try:
        found = [f"{folder.name}/{name}: does not belong to this checkpoint" for name in strangers(folder, manifest)]
    except OSError as error:
        found = [f"{folder.name}: {why(error)}"]
    for rank, record in enumerate(manifest["files"]):
        place = f"{folder.name}/{record['file']}"
        try:
            header, metadata, base = read_header(folder / record["file"])
        except (OSError, ValueError) as error:
            found.append(f"{place}: {why(error) if isinstance(error, OSError) else error}")
            continue
        if metadata != header_metadata(manifest, rank):
            owner = _other_owner(folder / record["file"], manifest, rank)
            found.append(f"{place}: is {owner or 'not of this checkpoint'}")
            continue
        for key, spot in header.items():
            try:
                name, kind, start = key.rsplit("|", 2)
                offset, end = (base + at for at in spot["data_offsets"])
                row = (int(start), spot["shape"][0], rank, offset, CODES.index(spot["dtype"]))
                inside = base <= offset <= end <= record["bytes"]
            except (ValueError, KeyError, TypeError, IndexError):
                inside = False
            if not inside:
                found.append(f"{place}: {key} is no range of it")
            elif name not in names or kind not in kinds:
                found.append(f"{place}: holds {name} {kind}, which the manifest does not know")
            else:
                rows.append((names[name], kinds[kind], *row))
    table: Table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    table = table[np.lexsort((table[:, START], table[:, KIND], table[:, PARAM]))]
    found = found or [f"{folder.name}: {gap}" for gap in _gaps(table, manifest)]
    if found:
        raise CheckpointError("\n".join(found))
    return table


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Names of files that look like this checkpoint's and are not in its manifest."""
    known = {record["file"] for record in all_files(manifest)}
    written = [name for name in list_folder(folder) if name.startswith(("rank-", "stream-"))]
    return sorted(name for name in written if name not in known)


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
    found, groups = [], group_rows(table, manifest)
    for (name, kind), numel in expected_ranges(manifest).items():
        first, end = groups.get((name, kind), (0, 0))
        starts, lengths = table[first:end, START], table[first:end, LENGTH]
        ends = starts + lengths
        at = np.concatenate(([0], ends))
        if not np.array_equal(at[:-1], starts) or at[-1] != numel:
            wrong = np.flatnonzero(at != np.concatenate((starts, [numel])))[0]
            found.append(f"{name} {kind}: elements from {at[wrong]} on are missing or there twice (of {numel})")
    return found


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
