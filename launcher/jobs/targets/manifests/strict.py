"""What makes a model strict: a field that is misspelt or of another type can be neither built nor passed as text."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from launcher.errors import nearest


class Model:
    """Base of the frozen dataclasses in this folder; their field names are those of the Kubernetes API.

    Raises:
        TypeError: a value is not of the type that the field declares.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            for complaint in complaints(hint, getattr(self, name), name, built=True):
                raise TypeError(f"{type(self).__name__}.{complaint}")


def plain(value: Any) -> Any:
    """A model as dicts, lists and scalars, without the fields that are None."""
    if isinstance(value, Model):
        return {name: plain(v) for name in _hints(type(value)) if (v := getattr(value, name)) is not None}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def complaints(hint: Any, value: Any, where: str, *, built: bool = False) -> Iterator[str]:
    """What keeps a value from being of a type, as `spec.suspend: expected bool, got 1`.

    built: the value belongs to a model, where parts are models and tuples; else it is plain, as read from text
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            yield from complaints(next(a for a in arguments if a is not type(None)), value, where, built=built)
        elif type(None) not in arguments:
            yield f"{where}: missing"
    elif origin is typing.Literal:
        if not any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            yield f"{where}: expected {' or '.join(map(str, arguments))}, got {value!r}"
    elif origin is tuple:
        if isinstance(value, tuple if built else list):
            for i, item in enumerate(value):
                yield from complaints(arguments[0], item, f"{where}[{i}]", built=built)
        else:
            yield f"{where}: expected a list, got {value!r}"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from complaints(arguments[0], key, f"{where}, key {key!r}", built=built)
                yield from complaints(arguments[1], item, f"{where}.{key}", built=built)
        else:
            yield f"{where}: expected a mapping, got {value!r}"
    elif isinstance(hint, type) and issubclass(hint, Model) and not built:
        yield from _inside(hint, value, where)
    elif type(value) is not hint:  # not isinstance: True is no number here
        yield f"{where}: expected {hint.__name__}, got {value!r}"


def _inside(model: type[Model], value: Any, where: str) -> Iterator[str]:
    """Complaints about a mapping that stands for a model."""
    if not isinstance(value, Mapping):
        yield f"{where}: expected a mapping, got {value!r}"
        return
    hints, dot = _hints(model), f"{where}." if where else ""
    for name in value:
        if name not in hints:
            yield f"{dot}{name}: no such field. {nearest(str(name), hints)}".rstrip()
    for field in fields(model):
        if field.name in value:
            yield from complaints(hints[field.name], value[field.name], dot + field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            yield f"{dot}{field.name}: missing"


def _hints(model: Any) -> dict[str, Any]:
    """Field to type of a model's class."""
    return _resolved(model)


@functools.cache
def _resolved(model: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(model)
    return {field.name: hints[field.name] for field in fields(model)}
