"""Proves a conversation's turns once for its shape (roles and parts), on stand-ins for all of its words.

A record of that shape is then rendered once, and has to be exactly the proven text with its own words put in. Where it
is not, as where a template looks at the words, the record is proven by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.data.left_out import WORDS, other_call
from launcher.data.proof import Conversation, Located, Place, prove
from launcher.errors import UserError

Message = Mapping[str, Any]

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use, so no template writes them
_PAD = "\u2003"  # white space that a template which trims takes away, and that none writes
_TOOLS = [{"type": "function", "function": {"name": f"{_OPEN}t{i}{_CLOSE}"}} for i in range(2)]
_INDENTS = (None, 4, 2)


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # as the `tojson` of templates does


_FIELD = re.compile(
    "|".join(
        [
            # words; a quote in them shows whether they are written as JSON
            f'(?P<left>{_PAD}?){_OPEN}(?P<turn>\\d+)_(?P<kind>[cr])(?P<json>\\\\?)"{_CLOSE}(?P<right>{_PAD}?)',
            f"{_OPEN}(?P<named>\\d+)_n{_CLOSE}",
            f"{_OPEN}(?P<caller>\\d+)_f(?P<called>\\d+){_CLOSE}",
            f'{{"{_OPEN}(?P<giver>\\d+)_a(?P<given>\\d+){_CLOSE}": 0}}',
            "Zq(?P<owner>\\d{4})(?P<number>\\d\\d)Z",  # ids have nine letters or digits where a template is strict
            *(
                f"{re.escape(_dumps(_TOOLS[0], n))}(?P<tools{n or 0}>[^{_OPEN}]*){re.escape(_dumps(_TOOLS[1], n))}"
                for n in _INDENTS
            ),
        ]
    )
)


def locate(conversation: Conversation, wanted: Sequence[int], *, bodies: bool) -> Located:
    """Where the `wanted` turns of a conversation lie in its text.

    Args:
        bodies: whether it matters where a turn's words end and what ends it begins.
    Raises:
        UserError: a turn cannot be proven, or the template leaves out a part of the conversation.
    """
    shape = _shape(conversation, tuple(wanted), bodies)
    if shape is not None:
        text = conversation.text()
        places = shape.fit(text, conversation)
        if places is not None:
            return Located(text, places, shape.notes)
    return prove(conversation, wanted, bodies=bodies)


@dataclass(frozen=True, slots=True)
class _Field:
    """Where words of a conversation lie in the text.

    turn: -1 for the tools
    key: content, reasoning_content, name, function, arguments, id or tools
    number: of the call in its turn; of the result's call 99
    left, right: whether the template trims there; escaped: whether it writes JSON
    between: what lies between two tools; indent: of their JSON
    """

    turn: int
    key: str
    number: int = 0
    left: bool = False
    right: bool = False
    escaped: bool = False
    between: str = ""
    indent: int | None = None

    def words(self, conversation: Conversation) -> str:
        """What stands there for another conversation."""
        if self.key == "tools":
            return self.between.join(_dumps(tool, self.indent) for tool in conversation.tools)
        message = conversation.messages[self.turn]
        if self.key in WORDS:
            text: str = message[self.key]
            text = text.lstrip() if self.left else text
            text = text.rstrip() if self.right else text
            return _dumps(text)[1:-1] if self.escaped else text
        if self.key == "id":
            return str(message["tool_call_id"] if self.number == 99 else message["tool_calls"][self.number]["id"])
        if self.key == "name":
            return str(message["name"])
        function = message["tool_calls"][self.number]["function"]
        return _dumps(function.get("arguments") or {}) if self.key == "arguments" else str(function["name"])


@dataclass(frozen=True, slots=True)
class _Shape:
    """A proven text with places for words.

    gaps: the template's own text around the fields, one more than these
    places: (turn, begin, body, end), each a character of the text as (gap, offset in it)
    notes: what the template leaves out
    """

    gaps: list[str]
    fields: list[_Field]
    places: list[tuple[int, list[tuple[int, int]]]]
    notes: list[str]

    def fit(self, text: str, conversation: Conversation) -> list[Place] | None:
        """The places in the text of another conversation; None where it is not this text with its words."""
        pieces, starts, at = [self.gaps[0]], [0], len(self.gaps[0])
        for field, gap in zip(self.fields, self.gaps[1:], strict=True):
            words = field.words(conversation)
            at += len(words)
            starts.append(at)
            at += len(gap)
            pieces += (words, gap)
        if at != len(text) or "".join(pieces) != text:
            return None
        return [Place(turn, *(starts[gap] + offset for gap, offset in corners)) for turn, corners in self.places]


def _shape(conversation: Conversation, wanted: tuple[int, ...], bodies: bool) -> _Shape | None:
    outline = [_outline(message) for message in conversation.messages]
    if None in outline:
        return None

    def find() -> _Shape | None:
        try:
            return _proven(conversation, wanted, bodies)
        except UserError:  # the record itself will say why, or the template does not take stand-ins
            return None

    key = ("shape", wanted, bodies, bool(conversation.tools), *outline)
    shape: _Shape | None = conversation.template.remembered(key, find)
    return shape


def _outline(message: Message) -> tuple[Any, ...] | None:
    """What of a message decides the text around its words; None where words alone do not make the difference."""
    seen: list[Any] = [message["role"]]
    for key, value in message.items():
        if key in WORDS:
            if value and value.isspace():
                return None
            seen += [key] if value else []
        elif key == "tool_calls":
            seen += [(bool(call["function"].get("arguments")), "id" in call) for call in value or ()]
        elif key in ("name", "tool_call_id"):
            seen += [key] if value else []
        elif key not in ("role", "train", "weight"):
            return None
    return tuple(seen)


def _proven(conversation: Conversation, wanted: tuple[int, ...], bodies: bool) -> _Shape | None:
    shown = [_stand_ins(message, turn) for turn, message in enumerate(conversation.messages)]
    stand_in = _StandIns(shown, _TOOLS if conversation.tools else None, conversation.template)
    located = prove(stand_in, wanted, bodies=bodies)
    text = located.text
    found = list(_FIELD.finditer(text))
    if sum(match[0].count(_OPEN) for match in found) != text.count(_OPEN):
        return None  # words that are not written as they stand
    fields = [_field(match) for match in found]
    edges = [0, *(at for match in found for at in match.span()), len(text)]
    gaps = list(zip(edges[::2], edges[1::2], strict=True))
    places = []
    for place in located.places:
        inside = [f for f, m in zip(fields, found, strict=True) if m.start() < place.end and place.begin < m.end()]
        corners = [_corner(at, gaps) for at in (place.begin, place.body, place.end)]
        if None in corners or any(field.turn != place.index for field in inside):
            return None
        places.append((place.index, [corner for corner in corners if corner is not None]))
    return _Shape([text[begin:end] for begin, end in gaps], fields, places, located.notes)


class _StandIns(Conversation):
    """A conversation whose words are known by sight, so that no alternative has to be rendered to find them."""

    def stretch(self, index: int, count: int | None = None, *, generation: bool = False) -> tuple[int, int] | None:
        text, mark = self.text(count, generation=generation), f"{_OPEN}{index}_"
        begin = text.find(mark)
        last = max(text.rfind(f"{mark}{kind}") for kind in "cra")
        last = last if last >= 0 else text.rfind(mark)  # a call without arguments
        if begin < 0 or any(text.count(f"{mark}{key[0]}") > 1 for key in WORDS):
            return None
        end = text.index(_CLOSE, last) + 1
        return begin - text[:begin].endswith(_PAD), end + text.startswith(_PAD, end)


def _stand_ins(message: Message, turn: int) -> dict[str, Any]:
    shown = dict(message)
    for key in WORDS:
        if message.get(key):
            shown[key] = f'{_PAD}{_OPEN}{turn}_{key[0]}"{_CLOSE}{_PAD}'
    if message.get("name"):
        shown["name"] = f"{_OPEN}{turn}_n{_CLOSE}"
    if message.get("tool_call_id"):
        shown["tool_call_id"] = f"Zq{turn:04}99Z"
    if calls := message.get("tool_calls"):
        shown["tool_calls"] = [_stand_in_call(call, turn, number) for number, call in enumerate(calls)]
    return shown


def _stand_in_call(call: Any, turn: int, number: int) -> Any:
    changed = other_call(call, f"{_OPEN}{turn}_f{number}{_CLOSE}", {f"{_OPEN}{turn}_a{number}{_CLOSE}": 0})
    return {**changed, "id": f"Zq{turn:04}{number:02}Z"} if "id" in call else changed


def _field(match: re.Match[str]) -> _Field:
    found = {name: value for name, value in match.groupdict().items() if value is not None}
    if "turn" in found:
        key = WORDS[0] if found["kind"] == "c" else WORDS[1]
        left, right, escaped = not found["left"], not found["right"], bool(found["json"])
        return _Field(int(found["turn"]), key, left=left, right=right, escaped=escaped)
    if "named" in found:
        return _Field(int(found["named"]), "name")
    if "caller" in found:
        return _Field(int(found["caller"]), "function", int(found["called"]))
    if "giver" in found:
        return _Field(int(found["giver"]), "arguments", int(found["given"]))
    if "owner" in found:
        return _Field(int(found["owner"]), "id", int(found["number"]))
    ((name, between),) = found.items()
    return _Field(-1, "tools", between=between, indent=int(name.removeprefix("tools")) or None)


def _corner(at: int, gaps: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """A character as (gap, offset in it); the first where it ends one and begins the next."""
    return next(((number, at - begin) for number, (begin, end) in enumerate(gaps) if begin <= at <= end), None)
