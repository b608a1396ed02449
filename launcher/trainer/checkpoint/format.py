"""How one rank's part of a checkpoint becomes a file: pieces, the share of each replica, the host copy, bytes and hash.

A file is plain safetensors: 8 bytes of header length, a JSON header, one contiguous buffer. Its tensors are 1-D ranges
of flattened parameters, keyed `name|kind|start`. Whether files make a checkpoint is up to `reader.py` and `saving.py`.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from launcher.trainer.checkpoint.verify import CHUNK, CheckpointError, read_header

__all__ = [
    "DTYPES", "CheckpointError", "FileRecord", "HostBuffer", "Piece", "Snapshot", "head_bytes", "layout", "rank_file",
    "read_header", "share_replicas", "stream_file", "take_snapshot", "write_file",
]  # fmt: skip

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A live range of one flattened tensor; written from, and read into in place.

    name: Hugging Face name of the parameter or persistent buffer
    kind: `value`, or the name of an optimizer state of the same shape (`exp_avg`, `exp_avg_sq`)
    start: first element of the range in the flattened tensor
    tensor: 1-D contiguous view of the memory in use, possibly empty
    replica: which of `num_replicas` equal copies of this range the rank holds, from 0. The ranks that hold the same
        copies list the same pieces in the same order.
    """

    name: str
    kind: str
    start: int
    tensor: Tensor
    replica: int = 0
    num_replicas: int = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file: its name, its size in bytes, and the xxh3-128 of all of them."""

    file: str
    bytes: int
    xxh3_128: str


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def stream_file(rank: int) -> str:
    """Name of the file with the lanes of a stream that a rank owns."""
    return f"stream-{rank:05d}.safetensors"


def share_replicas(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """What this rank writes: replica q of Q takes the q-th of Q equal cuts through all pieces laid end to end.

    No communication: every replica knows the same list. Empty ranges are left out.
    """
    groups: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.replica, piece.num_replicas].append(piece)
    for (replica, replicas), group in groups.items():
        total = sum(p.tensor.numel() * p.tensor.element_size() for p in group)
        low, high, at = replica * total // replicas, (replica + 1) * total // replicas, 0
        for p in group:
            size, count = p.tensor.element_size(), p.tensor.numel()
            first, end = (min(max(-(-(cut - at) // size), 0), count) for cut in (low, high))
            if first < end:
                yield Piece(p.name, p.kind, p.start + first, p.tensor[first:end])
            at += count * size


class HostBuffer:
    """Host memory for one copy of what a rank writes, kept from save to save: page faults cost more than the copy.

    pinned: page-locked, so that a GPU copies into it without staging
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, the same memory as last time unless more is needed."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        return self._memory[:num_bytes]


@dataclass(slots=True)
class Snapshot:
    """A rank's file before it is written.

    head: length and JSON header
    ranges: gives the uint8 host tensors that follow the header, end to end, perhaps taken from live tensors one at a
        time; called for each try
    size: of the file in bytes
    elements: number of elements written, by kind
    """

    head: bytes
    ranges: Callable[[], Iterable[Tensor]]
    size: int
    elements: dict[str, int] = field(default_factory=dict)


def take_snapshot(pieces: Iterable[Piece], metadata: dict[str, str], buffer: HostBuffer | None) -> Snapshot:
    """Copy what this rank must write; afterwards training may change the pieces.

    Args:
        metadata: goes into the header as safetensors' `__metadata__`
        buffer: where the copy goes. None: copy nothing; the pieces must then stay unchanged until the file is written.
    """
    rows = sorted(share_replicas(pieces), key=lambda p: -p.tensor.element_size())  # wide types first keeps all aligned
    head, elements = layout([(p.name, p.kind, p.start, p.tensor.dtype, p.tensor.numel()) for p in rows], metadata)
    size = sum(p.tensor.numel() * p.tensor.element_size() for p in rows)
    if buffer is None:
        return Snapshot(head, lambda: _live_bytes(rows), len(head) + size, elements)
    copied = _copy(rows, buffer.take(size))
    return Snapshot(head, lambda: [copied], len(head) + size, elements)


def layout(
    rows: Iterable[tuple[str, str, int, torch.dtype, int]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """(length and JSON header, elements by kind) of a file in which these ranges lie end to end.

    Args:
        rows: name, kind, start, dtype, number of elements
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    elements: dict[str, int] = defaultdict(int)
    at = 0
    for name, kind, start, dtype, count in rows:
        end = at + count * dtype.itemsize
        header[f"{name}|{kind}|{start}"] = {"dtype": DTYPES[dtype], "shape": [count], "data_offsets": [at, end]}
        elements[kind] += count
        at = end
    return head_bytes(header), dict(elements)


def head_bytes(header: dict[str, Any]) -> bytes:
    """A safetensors header with its length, padded so that the buffer after it is aligned."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _live_bytes(rows: list[Piece]) -> Iterator[Tensor]:
    for row in rows:
        yield row.tensor.cpu().view(torch.uint8)


def _copy(rows: list[Piece], host: Tensor) -> Tensor:
    """The rows end to end in host memory, complete when this returns.

    What lies on a GPU goes through a stream of its own, which begins when the work queued so far is done. Only that
    copy is waited for, not what other streams do meanwhile. State that was offloaded lies in host memory already, but
    the next step changes it in place, so it is copied all the same.
    """
    at, streams = 0, dict[torch.device, torch.cuda.Stream]()
    for row in rows:
        end = at + row.tensor.numel() * row.tensor.element_size()
        target, device = host[at:end].view(row.tensor.dtype), row.tensor.device
        if device.type == "cuda":
            if device not in streams:
                streams[device] = torch.cuda.Stream(device)
                streams[device].wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(streams[device]):
                target.copy_(row.tensor, non_blocking=True)
        else:
            target.copy_(row.tensor)
        at = end
    for stream in streams.values():
        copied = torch.cuda.Event()
        copied.record(stream)
        copied.synchronize()
    return host


def write_file(path: Path, snapshot: Snapshot, *, wrote: Callable[[], None] = lambda: None) -> FileRecord:
    """Write, hash and fsync one file, always a new one: what an earlier try left at this place goes first.

    Args:
        wrote: called each time storage has taken a chunk
    Raises:
        OSError: the disk is full, or gave up; the file is then unfinished.
    """
    path.unlink(missing_ok=True)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb", buffering=0) as file:
        for part in _chunks(snapshot):
            digest.update(part)
            size += len(part)
            while part:
                part = part[file.write(part) :]
                wrote()
        os.fsync(file.fileno())
    wrote()
    return FileRecord(path.name, size, digest.hexdigest())


def _chunks(snapshot: Snapshot) -> Iterator[memoryview]:
    yield memoryview(snapshot.head)
    for tensor in snapshot.ranges():
        data = memoryview(tensor.numpy())
        for at in range(0, len(data), CHUNK):
            yield data[at : at + CHUNK]
