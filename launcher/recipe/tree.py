"""Values that know where they were written, and how one level of them is laid over another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem

BAD = object()  # stands for a value that has been complained about already


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a file with its line from 1, or an argument, a variable or `default` without one."""

    file_or_argument: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file_or_argument if self.line is None else f"{self.file_or_argument}:{self.line}"


DEFAULT = Origin("default")


@dataclass(slots=True)
class Node:
    """A value and its origin; `value` is a scalar, a list of nodes, or a dict from text to nodes."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return "(unreadable)" if self.value is BAD else self.value


def node_of(value: Any, origin: Origin) -> Node:
    """The inverse of `Node.plain`, with one origin for all."""
    if isinstance(value, dict):
        return Node({key: node_of(inner, origin) for key, inner in value.items()}, origin)
    if isinstance(value, list):
        return Node([node_of(inner, origin) for inner in value], origin)
    return Node(value, origin)


def children(values: Any) -> list[tuple[str, Any]]:
    """The keys and values of a dict, the indices and items of a list, nothing of a scalar."""
    if isinstance(values, dict):
        return list(values.items())
    return [(str(i), item) for i, item in enumerate(values)] if isinstance(values, list) else []


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of what holds nothing further; an empty dict or list is a leaf."""
    inside = children(values)
    if not inside:
        yield key, values
    for name, inner in inside:
        yield from leaves(inner, f"{key}.{name}" if key else name)


def merge(lower: Node | None, upper: Node, problems: list[Problem], *, key: str = "") -> Node:
    """`upper` over `lower`: mappings join key by key, everything else is replaced whole.

    A mapping whose keys are all numbers changes (or, one past the end, lengthens) the list below it.
    """
    if lower is None or not isinstance(upper.value, dict):
        return upper
    if isinstance(lower.value, list) and upper.value and all(index.isdecimal() for index in upper.value):
        return _merge_items(lower, upper, problems, key)
    if not isinstance(lower.value, dict):
        return upper
    values = dict(lower.value)
    for name, node in upper.value.items():
        values[name] = merge(values.get(name), node, problems, key=f"{key}.{name}" if key else name)
    return Node(values, upper.origin if lower.origin is DEFAULT else lower.origin)


def _merge_items(lower: Node, upper: Node, problems: list[Problem], key: str) -> Node:
    items = list(lower.value)
    for index, node in sorted(upper.value.items(), key=lambda pair: int(pair[0])):
        place = int(index)
        if place < len(items):
            items[place] = merge(items[place], node, problems, key=f"{key}.{place}")
        elif place == len(items):
            items.append(node)
        else:
            fix = f"Write {key}.{len(items)} to add one."
            expected = f"an index from 0 to {len(items)}"
            problems.append(Problem(f"{key}.{index}", node.plain(), expected, fix, str(node.origin)))
    return Node(items, upper.origin if lower.origin is DEFAULT else lower.origin)


def within(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of `keys`, or lies below one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)
