"""What a record can become: a conversation, a completion, a text, tokens, a pair of answers, or an answer with a label.

Every format gives one of these, and everything that comes after reads nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

Note = Callable[[str], None]  # told the reason of each repair of a record, to be counted


class Skip(Exception):
    """A record that a format's known rule leaves out; its text is the reason, under which it is counted."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; rendered by the chat template.

    messages: in order, each {role, content: text} and where given tool_calls: [{"type": "function", "function":
        {"name": text, "arguments": dict}}], tool_call_id, name, reasoning_content: text, train: bool, weight: float
    tools: JSON schemas of the functions that may be called
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it; no template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; no template."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids (uint32) as somebody else made them, and the weight (float32) of each as a target; nothing is added."""

    ids: NDArray[Any]
    weights: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer; the turns before the answers are the same."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer and whether it is a good one."""

    example: Chat | Completion
    good: bool


Example = Chat | Completion | Text | Tokens | Pair | Labelled
