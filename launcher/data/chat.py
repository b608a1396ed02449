"""What of a conversation is trained: which turns, how much, and which characters of the rendered text those are.

Where a turn lies is proven by `launcher.data.shapes` and `launcher.data.proof`, which tokens that are by
`launcher.data.cuts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.data.formats import Chat
from launcher.data.proof import Conversation
from launcher.data.shapes import locate
from launcher.data.template import Template, template_of
from launcher.errors import UserError
from launcher.recipe.schema.data import Data

__all__ = ["MaskRule", "Rendered", "Span", "render", "template_of"]


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which turns are trained.

    train_on: assistant (every turn of `roles`), last_assistant, or all (every token of the text)
    roles: whose turns; tool results never are
    end_of_turn: whether what ends a trained turn is trained
    """

    train_on: str = "assistant"
    roles: tuple[str, ...] = ("assistant",)
    end_of_turn: bool = True

    @classmethod
    def of(cls, data: Data) -> MaskRule:
        """The rule of a recipe."""
        return cls(data.train_on, tuple(data.train_roles), data.train_end_of_turn)

    def weights(self, messages: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """How much each turn counts; what a message itself says outranks the rule. Turns that are absent: not at all.

        Raises:
            UserError: a tool result is to be trained, or a weight is none; names the turn.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        weights = {}
        for i, message in enumerate(messages):
            said = _said(message, i + 1)
            if said is not None:
                weights[i] = said
            elif self.train_on == "last_assistant":
                weights.update({i: 1.0} if i == last else {})
            elif self.train_on == "assistant" and message["role"] in self.roles:
                weights[i] = 1.0
        return weights


def _said(message: Mapping[str, Any], turn: int) -> float | None:
    """The weight that a message gives itself by `train` and `weight`."""
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return None
    value = 0.0 if train is False else 1.0 if weight is None else float(weight)
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"turn {turn}: weight = {weight}: expected a number of 0 or more.")
    if value and message["role"] == "tool":
        raise UserError(f"turn {turn}: a tool result is not written by the model and never trained. Remove its train.")
    return value


@dataclass(frozen=True, slots=True)
class Span:
    """Characters begin:end of the text are turn `turn` (from 1), and count `weight`."""

    turn: int
    begin: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    spans: what is trained, in order, apart from one another
    base: weight of everything outside of the spans, 0 or 1
    notes: what is to be counted, as reasoning that the template leaves out by its own design
    """

    text: str
    spans: list[Span]
    base: float = 0.0
    notes: list[str] = field(default_factory=list)


def render(chat: Chat, template: Template, rule: MaskRule) -> Rendered:
    """Render a conversation and find what is trained.

    Raises:
        UserError: the template refuses the conversation or would leave out a part of it, or a trained turn cannot be
            proven; names the turn.
    """
    if not chat.messages:
        raise UserError("the conversation has no turn.")
    weights = rule.weights(chat.messages)
    base = 1.0 if rule.train_on == "all" else 0.0
    wanted = [i for i, weight in weights.items() if weight != base]
    notes = []
    if empty := [i for i in wanted if weights[i] and _is_empty(chat.messages[i])]:
        wanted = [i for i in wanted if i not in empty]
        notes.append("a turn without words is not trained")
    located = locate(Conversation(chat.messages, chat.tools, template), wanted, bodies=not rule.end_of_turn)
    spans = []
    for place in located.places:
        end = place.end if rule.end_of_turn else place.body
        if end > place.begin:
            spans.append(Span(place.index + 1, place.begin, end, weights[place.index]))
    return Rendered(located.text, spans, base, [*notes, *located.notes])


def _is_empty(message: Mapping[str, Any]) -> bool:
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
