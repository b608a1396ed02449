"""How a record is read: its columns become a conversation, a completion, a text, tokens, or judged answers.

`choose` says which format a source has, `Format.read` reads its records; `examples` holds what they become.
"""

from __future__ import annotations

from launcher.data.formats.examples import Chat, Completion, Example, Labelled, Note, Pair, Skip, Text, Tokens
from launcher.data.formats.form import Format
from launcher.data.formats.recognise import choose

__all__ = [
    "Chat", "Completion", "Example", "Format", "Labelled", "Note", "Pair", "Skip", "Text", "Tokens",
    "choose",
]  # fmt: skip
