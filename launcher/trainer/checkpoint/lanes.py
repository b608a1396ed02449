"""How the lanes of a stream lie in a checkpoint: a file for each rank that owns some, read by whoever owns them next.

The file is plain safetensors like the others, with a tensor `lane-00012|tokens|0` for each array of a lane's state. The
manifest says which lanes each file holds, so a rank opens only the files that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.trainer.checkpoint.format import CheckpointError, Snapshot, layout, read_header

Arrays = Mapping[str, NDArray[Any]]
LanesTaken = Callable[[], Mapping[int, Arrays]]  # the lanes of a rank as they were at the save; called in the thread

_TYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


def lanes_snapshot(lanes: Mapping[int, Arrays], metadata: dict[str, str]) -> Snapshot:
    """The file of these lanes, before it is written."""
    found = [(lane, name, np.ascontiguousarray(array)) for lane in lanes for name, array in lanes[lane].items()]
    found.sort(key=lambda entry: -entry[2].itemsize)  # wide types first keeps all aligned
    tensors = [torch.from_numpy(array.reshape(-1).view(np.uint8).copy()) for _, _, array in found]
    head, _ = layout([(_key(lane), name, 0, _dtype(array), array.size) for lane, name, array in found], metadata)
    return Snapshot(head, lambda: tensors, len(head) + sum(tensor.numel() for tensor in tensors))


def read_lanes(
    folder: Path, manifest: Mapping[str, Any], wanted: Collection[int]
) -> dict[int, dict[str, NDArray[Any]]]:
    """The arrays of these lanes, each flattened.

    Raises:
        CheckpointError: the checkpoint does not hold one of them.
    """
    found: dict[int, dict[str, NDArray[Any]]] = {}
    for record in manifest.get("stream", ()):
        mine = {_key(lane): lane for lane in record["lanes"] if lane in wanted}
        if mine:
            header, _, base = read_header(folder / record["file"])
            with open(folder / record["file"], "rb") as file:
                for key, spot in header.items():
                    name, array, _ = key.rsplit("|", 2)
                    if name in mine:
                        begin, end = spot["data_offsets"]
                        file.seek(base + begin)
                        data = np.frombuffer(file.read(end - begin), _TYPES[spot["dtype"]])
                        found.setdefault(mine[name], {})[array] = data
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{folder.name}: holds no state of the lanes {missing} of the stream")
    return found


def check_lanes(records: list[dict[str, Any]]) -> None:
    """Never commit what could not be loaded: each lane is there once, from 0 on.

    Raises:
        CheckpointError: one is missing or there twice.
    """
    lanes = sorted(lane for record in records for lane in record["lanes"])
    if lanes != list(range(len(lanes))):
        raise CheckpointError(f"the ranks own the lanes {lanes} of the stream, expected each once from 0 on")


def _key(lane: int) -> str:
    return f"lane-{lane:05d}"


def _dtype(array: NDArray[Any]) -> torch.dtype:
    dtype: torch.dtype = torch.from_numpy(np.zeros(1, array.dtype)).dtype
    return dtype
