"""A torch.distributed.checkpoint folder, as FSDP with `get_state_dict` or Accelerate lays it down; no process group."""

from __future__ import annotations

import collections
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.convert.restricted import first_line, unpickler
from launcher.convert.source import MOMENTS, Source, as_step, one_step, trainer_step
from launcher.errors import UserError

METADATA = ".metadata"
_STATE = re.compile(r"(?:.*?\.)?state\.(?P<name>.+)\.(?P<kind>\w+)")
_ACCELERATE = ("pytorch_model_fsdp_*", "optimizer_*")  # two folders, beside each other


def is_dcp(path: Path) -> bool:
    """Whether a folder was written by `torch.distributed.checkpoint`, or holds the two that Accelerate writes."""
    return (path / METADATA).is_file() or any(path.glob(f"{_ACCELERATE[0]}/{METADATA}"))


def open_dcp(path: Path) -> Source:
    """See the module.

    Raises:
        UserError: the metadata or a file it names cannot be read, or the optimizer state is not Adam's.
    """
    folders = [path] if (path / METADATA).is_file() else [p for g in _ACCELERATE for p in sorted(path.glob(g))]
    values: dict[str, _Entry] = {}
    states: dict[str, dict[str, _Entry]] = collections.defaultdict(dict)
    for folder in folders:
        if not (folder / METADATA).is_file():
            continue
        for key, entry in _entries(folder):
            if match := _STATE.fullmatch(key):
                states[match["name"]][match["kind"]] = entry
            elif entry.shape is not None and ".param_groups." not in f".{key}":
                values[key] = entry
    title = f"torch checkpoint folder {path.name}"
    moments = frozenset(name for name, state in states.items() if all(kind in state for kind in MOMENTS))
    steps = {as_step(state["step"].load()) for state in states.values() if "step" in state}
    known = {name: _value_of(name, values) for name in moments}

    def read(name: str, kind: str) -> Tensor:
        entry = values[name] if kind == "value" else states[by_value[name]][kind]
        return entry.load()  # type: ignore[no-any-return]

    by_value = {value: name for name, value in known.items() if value is not None}
    updates = one_step(steps, title) if moments else None
    step = trainer_step(path)
    kinds = sorted({kind for state in states.values() for kind in state})
    return Source(
        title, {key: entry.shape for key, entry in values.items() if entry.shape is not None}, read,
        moments=frozenset(by_value), step=updates if step is None else step, updates=updates,
        why_no_moments=(
            f"its optimizer state holds {', '.join(kinds)}: expected {' and '.join(MOMENTS)}" if states
            else "it holds no optimizer state"
        ),
    )  # fmt: skip


def _value_of(name: str, values: dict[str, Any]) -> str | None:
    """The key of a parameter's value, given its name in the optimizer state; it may have a prefix there."""
    if name in values:
        return name
    found = [key for key in values if key.endswith(f".{name}")]
    return min(found, key=len) if found else None


class _Entry:
    """One thing of the folder; `shape` is None for what is no tensor."""

    def __init__(self, shape: tuple[int, ...] | None, load: Callable[[], Any]) -> None:
        self.shape, self.load = shape, load


def _entries(folder: Path) -> list[tuple[str, _Entry]]:
    """(key, entry) of everything in a folder."""
    metadata = _read_metadata(folder)
    places: dict[str, list[tuple[Any, Any]]] = collections.defaultdict(list)
    for index, info in metadata.storage_data.items():
        places[index.fqn].append((index.offset, info))
    if missing := sorted({i.relative_path for s in places.values() for _, i in s} - {p.name for p in folder.iterdir()}):
        raise UserError(f"{folder}: {', '.join(missing[:3])}: named in {METADATA}, but missing.")
    found = []
    for key, entry in metadata.state_dict_metadata.items():
        size = getattr(entry, "size", None)
        if size is None:
            found.append((key, _Entry(None, partial(_load, folder, places[key][0][1]))))
        else:
            found.append((key, _Entry(tuple(size), partial(_join, folder, entry, places[key]))))
    return found


def _join(folder: Path, entry: Any, places: list[tuple[Any, Any]]) -> Tensor:
    """The whole tensor from its chunks."""
    out = torch.empty(entry.size, dtype=entry.properties.dtype)
    filled = 0
    for offset, info in places:
        part = _load(folder, info)
        spot = tuple(slice(at, at + size) for at, size in zip(offset or [0] * part.dim(), part.shape, strict=True))
        out[spot].copy_(part)
        filled += part.numel()
    if filled != out.numel():
        raise UserError(f"{folder}: a tensor of {out.numel()} elements has chunks of {filled} together.")
    return out


def _load(folder: Path, info: Any) -> Any:
    """One chunk or object."""
    path = folder / info.relative_path
    if info.transform_descriptors if hasattr(info, "transform_descriptors") else None:
        raise UserError(f"{path}: was written with {info.transform_descriptors}: expected plain files.")
    try:
        with open(path, "rb") as file:
            file.seek(info.offset)
            return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _read_metadata(folder: Path) -> Any:
    """The pickled description; only torch's own plain records are built from it."""
    from torch.distributed.checkpoint import filesystem, metadata

    allowed: dict[tuple[str, str], Any] = {}
    for module, names in (
        (metadata, ("Metadata", "BytesStorageMetadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta")),
        (metadata, ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
        (filesystem, ("_StorageInfo",)),
    ):
        allowed |= {(module.__name__, name): getattr(module, name) for name in names}
    try:
        with open(folder / METADATA, "rb") as file:
            found = unpickler(allowed)(file).load()
    except Exception as error:  # a damaged pickle may call anything that is known here with anything
        raise UserError(f"{folder / METADATA}: cannot be read: {first_line(error)}") from error
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{folder / METADATA}: is of type {type(found).__name__}, expected torch's Metadata.")
    return found
