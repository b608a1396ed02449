"""What becomes of `{{name}}` in the texts of conversations and completions: filled where the recipe says what it is.

Nothing is guessed: words between braces are also how Jinja, Vue and others write code, so what is not named stays as it
stands. Text to pre-train on is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.data.formats.examples import Chat, Completion, Example, Labelled, Note, Pair

_WORD = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")
_IDENTITY = frozenset({"name", "author"})  # those of LLaMA-Factory's identity.json


def fill(example: Example, placeholders: Mapping[str, str], note: Note) -> Example:
    """The example with every named placeholder filled; tells `note` of those that are left."""
    left: set[str] = set()

    def filled(text: str) -> str:
        if "{{" not in text:
            return text
        found = set(_WORD.findall(text))
        left.update(found - placeholders.keys() if placeholders else found & _IDENTITY)
        return _WORD.sub(lambda m: placeholders.get(m[1], m[0]), text) if found & placeholders.keys() else text

    made = _mapped(example, filled)
    if left and placeholders:
        note("holds a {{placeholder}} that data.placeholders does not name, left as it stands")
    elif left:
        note("holds {{name}} or {{author}}, left as it stands: data.placeholders says what it is")
    return made


def _mapped(example: Example, change: Callable[[str], str]) -> Example:
    match example:
        case Chat(messages, tools):
            return Chat([_message(message, change) for message in messages], tools)
        case Completion(prompt, completion):
            return Completion(change(prompt), change(completion))
        case Pair(chosen, rejected):
            return Pair(_mapped(chosen, change), _mapped(rejected, change))  # type: ignore[arg-type]
        case Labelled(inner, good):
            return Labelled(_mapped(inner, change), good)  # type: ignore[arg-type]
        case _:
            return example


def _message(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    keys = ("content", "reasoning_content")
    return {**message, **{key: change(message[key]) for key in keys if key in message}}
