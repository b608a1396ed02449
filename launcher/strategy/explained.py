"""Settings together with the reason for each: what every strategy gives, so that a rendered job can explain itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Explained = dict[str, tuple[Any, str]]  # dotted key -> value and reason, in the order in which files show them


def nested(explained: Explained) -> dict[str, Any]:
    """The values alone, as the nested mapping that dotted keys stand for."""
    found: dict[str, Any] = {}
    for key, (value, _) in explained.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by dotted key; an empty mapping is a leaf."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(dotted(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
