"""Reads other tools' pickled files without running what they name: tensors and plain containers, no more."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from launcher.errors import UserError

_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    **{("builtins", kind.__name__): kind for kind in (dict, list, set, frozenset, tuple, int, float, complex, bool)},
}


def _rebuild_plain(rebuild: Any, kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor that was saved with Python attributes on it, without them (`torch._tensor._rebuild_from_type_v2`)."""
    return rebuild(*arguments)


class Inert:
    """Stands for an object of a class that is not known here: it takes whatever is put into it and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


def unpickler(allowed: dict[tuple[str, str], Any]) -> type[pickle.Unpickler]:
    """A pickle reader that knows torch's tensors, plain containers and what is `allowed`; the rest is inert."""

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            key = (module, name)
            if key in allowed:
                return allowed[key]
            if key in _CONTAINERS:
                return _CONTAINERS[key]
            if key == ("torch._tensor", "_rebuild_from_type_v2"):
                return _rebuild_plain
            if key in _TENSORS:
                return super().find_class(module, name)
            if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
                return found
            return type(name, (Inert,), {})

    return Restricted


class _PickleModule:
    """What `torch.load` wants of a pickle module."""

    __name__ = "launcher.convert.restricted"
    Unpickler = unpickler({})

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        return _PickleModule.Unpickler(file, **options).load()


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote; tensors are mapped, so that only those which are read come into memory.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PickleModule())
    except Exception as error:  # a damaged pickle may call anything that is known here with anything
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def entry_of(values: Any, key: Any, kind: type, path: Path) -> Any:
    """An entry of what a file holds.

    Raises:
        UserError: it is missing, or of another kind than its tool writes.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: is {_described(values)}, expected a mapping with {key}.")
    found = values.get(key)
    if not isinstance(found, kind):
        held = _described(found) if key in values else "missing"
        raise UserError(f"{path}: {key} is {held}, expected {_KINDS[kind]}.")
    return found


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_KINDS: dict[type, str] = {dict: "a mapping", list: "a list", int: "a whole number", str: "text", type(None): "null"}


def _described(value: Any) -> str:
    if isinstance(value, Inert):
        return f"an object of {type(value).__name__}, of which nothing is read"
    return _KINDS.get(type(value), f"of type {type(value).__name__}")
