"""Random access to what a checkpoint holds, once `verify.py` trusts it. Knows no engine and no process group."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launcher.run.directory import MARKER
from launcher.run.files import retrying
from launcher.trainer.checkpoint.format import DTYPES
from launcher.trainer.checkpoint.retention import Hold
from launcher.trainer.checkpoint.verify import (
    CODES,
    LENGTH,
    MANIFEST,
    START,
    TYPE,
    VERSION,
    CheckpointError,
    Manifest,
    Table,
    all_files,
    expected_ranges,
    group_rows,
    header_metadata,
    marker_text,
    open_plain,
    read_manifest,
    read_table,
    verify_files,
)  # fmt: skip

__all__ = [
    "MANIFEST", "MARKER", "VERSION", "Manifest", "Reader", "Table", "all_files", "expected_ranges", "header_metadata",
    "marker_text", "read_manifest", "read_table", "verify_files",
]  # fmt: skip

_TYPES = {code: dtype for dtype, code in DTYPES.items()}


class Reader:
    """Reads the ranges asked for and no other bytes, through memory maps of the files that hold them.

    Args:
        table: from `read_table`, here or on another rank; None: read it now
        hold: on the checkpoint, kept as long as the reader
    """

    def __init__(
        self, folder: Path, manifest: Manifest, table: Table | None = None, *, hold: Hold | None = None
    ) -> None:
        self.folder, self.manifest, self._hold = folder, manifest, hold
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
        return _TYPES[CODES[int(self.table[self._groups[name, kind][0], TYPE])]]

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
            count, dtype = min(end, begin + length) - at, _TYPES[CODES[code]]
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
            path = self.folder / self.manifest["files"][index]["file"]
            self._maps[index] = retrying(lambda: _mapped(path), what=path)
        return self._maps[index]


def _mapped(path: Path) -> mmap.mmap:
    with open_plain(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants writable memory
