"""What a record's values may be: reads a text, a list, JSON or a yes/no, and says what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from launcher.errors import UserError


def present(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column that a record must have."""
    if record.get(column) is None:
        has = ", ".join(name for name, value in record.items() if value is not None) or "nothing"
        what = "is null" if column in record else "is missing"
        raise UserError(
            f"column {column} {what} (the record has {has}). Fill it, leave the record out, or name the column with "
            f"columns: {{our name: the file's}}."
        )
    return record[column]


def text(record: Mapping[str, Any], column: str) -> str:
    """The text of a column that a record must have."""
    value = present(record, column)
    if not isinstance(value, str):
        raise UserError(f"column {column} is {kind(value)}, expected text.")
    return value


def optional_text(record: Mapping[str, Any], column: str | None) -> str:
    """The text of a column that a record may have; else empty."""
    value = record.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {column} is {kind(value)}, expected text.")
    return value or ""


def listing(record: Mapping[str, Any], column: str, of: str) -> list[Any]:
    """The list of a column that a record must have; JSON text of a list counts as one."""
    value = decoded(present(record, column), f"column {column}", only="[")
    if not isinstance(value, list):
        raise UserError(f"column {column} is {kind(value)}, expected a list of {of}.")
    return value


def truth(value: Any, what: str) -> bool:
    """True or false; the words count, as csv holds nothing but text. A number may be a class: refused."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise UserError(f"{what} is {shown(value)}, expected true (a good answer) or false (a bad one).")


def decoded(value: Any, what: str, *, only: str = "") -> Any:
    """The value that a JSON text stands for, where it is one (`only`: where it begins with one of these characters)."""
    if not isinstance(value, str) or (only and value.lstrip()[:1] not in tuple(only)):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{what} is not JSON: {complaint(error)}: {shown(value)}. Write it as JSON.") from error


def complaint(error: ValueError) -> str:
    """What JSON complains of, and where in the text; its own line numbers would be read as those of the file."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A value as a message quotes it: its beginning."""
    words = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    words = words if len(words) <= 60 else f"{words[:57]}..."
    return f"'{words}'" if isinstance(value, str) else words
