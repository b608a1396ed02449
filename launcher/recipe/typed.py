"""A merged tree becomes a typed recipe; unknown keys, wrong types and missing values are complaints, not repairs."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from launcher.errors import Problem, nearest
from launcher.recipe.names import meant
from launcher.recipe.schema import MISSING, Recipe, to_dict
from launcher.recipe.schema._docs import describe, field_docs
from launcher.recipe.tree import BAD, DEFAULT, Node, Origin, leaves, within

_NOT_GIVEN = "(missing)"
_NOT_FINITE = ("nan", "inf", "infinity")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")


@dataclass(slots=True)
class Typed:
    """A recipe as far as it could be built.

    broken: keys that hold a stand-in for a value that was complained of
    lost: keys that were probably given, but under a name that nobody knows or where nothing could be read
    """

    recipe: Recipe
    origins: dict[str, Origin]
    problems: list[Problem]
    broken: set[str]
    lost: set[str]


def build(tree: Node, *, lost: Collection[str] = ()) -> Typed:
    """The typed recipe of a merged tree, with the origin of every leaf (`data.train.0.path`).

    lost: keys that may have been given where nothing could be read: they are not complained of as missing
    """
    builder = _Builder(lost={*lost})
    recipe = builder.convert(Recipe, tree, "")
    for key, _ in leaves(to_dict(recipe)):  # what nobody wrote comes from the schema
        builder.origins.setdefault(key, DEFAULT)
    if builder.problems or builder.broken:
        _fill(recipe)
    problems = [p for p in builder.problems if p.value != _NOT_GIVEN or not within(p.key, builder.lost)]
    return Typed(recipe, builder.origins, problems, builder.broken, builder.lost)


@dataclass(slots=True)
class _Builder:
    origins: dict[str, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)

    def complain(self, node: Node, key: str, expected: str, fix: str = "", *, value: Any = None) -> Any:
        where = "" if node.origin is DEFAULT else str(node.origin)
        self.problems.append(Problem(key, node.plain() if value is None else value, expected, fix, where))
        self.broken.add(key)
        return BAD

    def convert(self, hint: Any, node: Node, key: str) -> Any:
        """The value of `node` as `hint`, or BAD after a complaint."""
        if node.value is BAD:
            self.broken.add(key)
            return BAD
        if isinstance(node.value, str) and node.value == MISSING:
            return self.complain(node, key, describe(hint))
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            if node.value is None and type(None) in typing.get_args(hint):
                return self.leaf(node, key)
            kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
            if len(kinds) > 1:  # plain types and words side by side, as bool | int or int | Literal["auto"]
                return self.leaf(node, key) if _is_one(node.value, kinds) else self.complain(node, key, describe(hint))
            hint = kinds[0]
        if is_dataclass(hint):
            return self.section(typing.cast(type, hint), node, key)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is list:
            return self.items(hint, arguments[0], node, key)
        if origin is dict or hint is Any:
            return self.mapping(hint, node, key)
        if origin is typing.Literal:
            return self.word(hint, arguments, node, key)
        return self.scalar(hint, node, key)

    def leaf(self, node: Node, key: str) -> Any:
        self.origins[key] = node.origin
        return node.value

    def section(self, cls: type, node: Node, key: str) -> Any:
        if not isinstance(node.value, dict):
            return self.complain(node, key, _mapping_words(cls, key))
        hints = typing.get_type_hints(cls)
        prefix = f"{key}." if key else ""
        for name in node.value.keys() - hints.keys():
            self.unknown(node.value[name], prefix + name, list(hints))
        values = {}
        for f in fields(cls):
            given = node.value.get(f.name)
            if (given is None and f.default == MISSING) or (given is not None and given.value == MISSING):
                place = node if given is None or given.origin is DEFAULT else given
                self.missing(cls, f.name, hints[f.name], place, prefix + f.name)
            elif given is not None and (value := self.convert(hints[f.name], given, prefix + f.name)) is not BAD:
                values[f.name] = value
        return cls(**values)

    def unknown(self, node: Node, key: str, allowed: list[str]) -> None:
        section = key.rpartition(".")[0]
        expected = f"a key of {section}" if section else "a section"
        probably = meant(key, allowed)
        fix = f"Did you mean {probably}?" if probably else f"There are: {', '.join(allowed)}."
        value = "{...}" if isinstance(node.value, dict) else node.plain()
        self.complain(node, key, f"{expected}; this one is unknown", fix, value=value)
        if probably:
            self.lost.add(probably.partition(" ")[0])

    def missing(self, cls: type, name: str, hint: Any, node: Node, key: str) -> None:
        meaning = field_docs(cls)[name]
        self.complain(node, key, f"{describe(hint)} ({meaning})", "It has no default: give it.", value=_NOT_GIVEN)

    def items(self, hint: Any, inner: Any, node: Node, key: str) -> Any:
        if not isinstance(node.value, list):
            fix = ""
            if isinstance(node.value, str | int | float):
                text = node.plain()
                fix = f"Write [{{path: {text}}}]." if is_dataclass(inner) else f"Write [{text}]."
            return self.complain(node, key, describe(hint), fix)
        if not node.value:
            self.origins[key] = node.origin
        values = [self.convert(inner, item, f"{key}.{i}") for i, item in enumerate(node.value)]
        if any(value is BAD for value in values):
            self.broken.add(key)  # its length and the numbers of its items are no longer the user's
        return [value for value in values if value is not BAD]

    def mapping(self, hint: Any, node: Node, key: str) -> Any:
        """Free keys: dict[str, str], or dict[str, Any] whose inside is taken as it is."""
        inner = Any if hint is Any else typing.get_args(hint)[1]
        if isinstance(node.value, dict):
            if not node.value:
                self.leaf(node, key)
            pairs = {name: self.convert(inner, value, f"{key}.{name}") for name, value in node.value.items()}
            return {name: value for name, value in pairs.items() if value is not BAD}
        if hint is not Any:
            return self.complain(node, key, describe(hint))
        if isinstance(node.value, list):
            return self.items(list[Any], Any, node, key)
        return self.leaf(node, key)

    def word(self, hint: Any, allowed: tuple[Any, ...], node: Node, key: str) -> Any:
        for value in allowed:
            if value == node.value and type(value) is type(node.value):
                return self.leaf(node, key)
        fix = ""
        if isinstance(node.value, str):
            quoted = {"true": True, "false": False}.get(node.value, node.value) in allowed
            fix = (
                "Write it without quotes."
                if quoted
                else nearest(node.value, [a for a in allowed if isinstance(a, str)])
            )
        return self.complain(node, key, describe(hint), fix)

    def scalar(self, hint: type, node: Node, key: str) -> Any:
        value = node.value
        if hint is float and type(value) in (int, float):
            if math.isfinite(value):
                self.leaf(node, key)
                return float(value)
            return self.complain(node, key, "a finite number")
        if type(value) is hint:
            return self.leaf(node, key)
        if hint is float and isinstance(value, str) and value.strip().lower().lstrip("+-.") in _NOT_FINITE:
            return self.complain(node, key, "a finite number")
        return self.complain(node, key, describe(hint), _fix(hint, value))


def _fix(hint: type, value: Any) -> str:
    """What to write when a scalar has the wrong type but its meaning is plain."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if hint is str and not isinstance(value, dict | list) and value is not None and str(value)[:1] != "-":
        return f"Put it in quotes: '{str(value).lower() if isinstance(value, bool) else value}'."
    if hint is bool and value in (0, 1, "true", "false", "True", "False"):
        return f"Write {'true' if value in (1, 'true', 'True') else 'false'}, without quotes."
    if hint in (int, float) and isinstance(value, str):
        return _number_fix(hint, value.strip())
    return ""


def _number_fix(hint: type, text: str) -> str:
    """The number that a text plainly is, commas between thousands included; "5,6" may be 5.6, 56 or two numbers."""
    plain = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    try:
        number = float(plain)
    except ValueError:
        return ""
    if not math.isfinite(number) or (hint is int and not number.is_integer()):
        return ""
    written = str(int(number)) if hint is int and not plain.lstrip("+-").isdigit() else plain
    return f"Write {written}, without {'commas' if plain != text else 'quotes'}."


def _fill(section: Any) -> None:
    """Put something of the right type where a required value is missing, so that rules can look at all the others."""
    for f in fields(section):
        value = getattr(section, f.name)
        if isinstance(value, str) and value == MISSING:
            setattr(section, f.name, "" if f.type == "str" else 1)
        for inner in value if isinstance(value, list) else [value]:
            if is_dataclass(inner):
                _fill(inner)


def _mapping_words(cls: type, key: str) -> str:
    names = ", ".join(f.name for f in fields(cls))
    preset = "" if "." in key else "the name of a preset, or "
    return f"{preset}a mapping with the keys {names}"


def _is_one(value: Any, kinds: list[Any]) -> bool:
    """Whether a value is of one of these plain types, or one of these words."""
    return any(
        value in typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else type(value) is kind
        for kind in kinds
    )
