"""Proves where a turn lies in the text that a chat template makes of a conversation; what cannot be proven is refused.

Two proofs, the first that holds is taken. *By beginnings*: what the template writes for the turns before, with its
generation prompt, and for the turns up to it both begin the whole text. *By alternatives*, for templates that rewrite
earlier turns: stand-ins take the place of a turn's words, and of those of the turn before it; exactly one stretch of
the text changes, after it comes the text that ends a turn, before it the generation prompt.

Both are carried out on stand-ins for all words of a conversation, once for each shape (roles and parts) that a template
is given; a record is then rendered once, and has to be exactly the proven text with its own words put in. Where it is
not, as with tool calls or where a template looks at the words, the record is proven by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.data.template import Template
from launcher.errors import UserError

Message = Mapping[str, Any]

_OPEN, _CLOSE = "\ue000", "\ue001"  # around the stand-ins of a shape; private use, so no template writes them
_FROM, _TO = "\ue002", "\ue003"  # around those of an alternative
_PAD = "\u2003"  # white space that a template which trims takes away, and that none writes
_FIELD = re.compile(f"({_PAD}?){_OPEN}(\\d+)([cr]){_CLOSE}({_PAD}?)")
_OTHER = "Use data.train_on=last_assistant or another data.chat_template."
_KEYS = {"c": "content", "r": "reasoning_content"}
_THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)  # reasoning inside of the content
_MOST_REMEMBERED = 4096

REASONING_LEFT_OUT = "reasoning that the chat template leaves out"
CONTENT_LEFT_OUT = "words beside tool calls that the chat template leaves out"


@dataclass(frozen=True, slots=True)
class Place:
    """Characters begin:end of the text are what is written as turn `index`, from 0; from `body` on it only ends."""

    index: int
    begin: int
    body: int
    end: int


@dataclass(frozen=True, slots=True)
class Located:
    """A conversation's text, the turns that were asked for, and what the template leaves out by its design."""

    text: str
    places: list[Place]
    notes: list[str]


class Conversation:
    """Messages under a template; remembers what it rendered."""

    def __init__(self, messages: Sequence[Message], tools: Any, template: Template) -> None:
        self.messages = messages
        self.tools = tools
        self.template = template
        self._rendered: dict[tuple[int, bool, int], str] = {}

    def text(self, count: int | None = None, *, generation: bool = False, changed: int = -1) -> str:
        """The first `count` turns (all of them by default) as text, turn `changed` with stand-ins for its words.

        Raises:
            UserError: the template refuses them.
        """
        count = len(self.messages) if count is None else count
        key = (count, generation, changed)
        if key not in self._rendered:
            shown = [_alternative(m) if i == changed else m for i, m in enumerate(self.messages[:count])]
            try:
                self._rendered[key] = self.template.render(shown, tools=self.tools, generation=generation)
            except UserError as error:
                where = "" if count == len(self.messages) else f"turns 1 to {count} alone: "
                raise UserError(f"{where}{error}") from error
        return self._rendered[key]


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
        places = shape.fit(text, conversation.messages)
        if places is not None:
            return Located(text, places, shape.notes)
    return _located(conversation, wanted, bodies)


def _located(conversation: Conversation, wanted: Sequence[int], bodies: bool) -> Located:
    text = conversation.text()
    notes = _left_out(conversation, text)
    marked = _marked(conversation, text) if conversation.template.marks and wanted else {}
    places = [marked[i] if i in marked else _place(conversation, text, i, bodies) for i in wanted]
    if REASONING_LEFT_OUT not in notes and _is_thought_left_out(conversation.messages, text):
        notes = [*notes, REASONING_LEFT_OUT]
    return Located(text, places, notes)


# Shapes: proven once on stand-ins


@dataclass(frozen=True, slots=True)
class _Shape:
    """A proven text with places for words.

    gaps: the template's own text around the words, one more than `words`
    words: (turn, key, trimmed on the left, on the right)
    places: (turn, begin, body, end), each a character of the text as (gap, offset in it)
    """

    gaps: list[str]
    words: list[tuple[int, str, bool, bool]]
    places: list[tuple[int, tuple[int, int], tuple[int, int], tuple[int, int]]]
    notes: list[str] = field(default_factory=list)

    def fit(self, text: str, messages: Sequence[Message]) -> list[Place] | None:
        """The places in the text of other words; None where it is not this text with those words."""
        pieces, starts, at = [self.gaps[0]], [0], len(self.gaps[0])
        for (turn, key, left, right), gap in zip(self.words, self.gaps[1:], strict=True):
            value: str = messages[turn][key]
            value = value.lstrip() if left else value
            value = value.rstrip() if right else value
            at += len(value)
            starts.append(at)
            at += len(gap)
            pieces += (value, gap)
        if at != len(text) or "".join(pieces) != text:
            return None
        return [Place(turn, *(starts[gap] + offset for gap, offset in cuts)) for turn, *cuts in self.places]


def _shape(conversation: Conversation, wanted: tuple[int, ...], bodies: bool) -> _Shape | None:
    parts = [_part(message) for message in conversation.messages]
    if conversation.tools or None in parts:
        return None

    def prove() -> _Shape | None:
        try:
            return _proven_shape(conversation, wanted, bodies)
        except UserError:  # the record itself will say why, or the template does not take stand-ins
            return None

    shape: _Shape | None = _remembered(conversation.template, ("shape", wanted, bodies, *parts), prove)
    return shape


def _remembered(template: Template, key: Any, find: Callable[[], Any]) -> Any:
    """What was found about a template; the memory is emptied when it is full."""
    if key not in template.memory:
        found = find()
        if len(template.memory) >= _MOST_REMEMBERED:
            template.memory.clear()
        template.memory[key] = found
    return template.memory[key]


def _part(message: Message) -> tuple[str, ...] | None:
    """What of a message decides the text around its words; None where words alone do not make the difference."""
    content, reasoning = message["content"], message.get("reasoning_content") or ""
    if message.get("tool_calls") or (content and content.isspace()) or (reasoning and reasoning.isspace()):
        return None
    others = [key for key in message if key not in ("role", "content", "reasoning_content", "train", "weight")]
    if any(not isinstance(message[key], str | None) for key in others):
        return None
    seen = "c" * bool(content) + "r" * bool(reasoning)
    return (message["role"], seen, *(f"{key}={message[key]}" for key in others if message[key] is not None))


def _proven_shape(conversation: Conversation, wanted: tuple[int, ...], bodies: bool) -> _Shape | None:
    shown: list[dict[str, Any]] = []
    for i, message in enumerate(conversation.messages):
        stand_ins = {k: f"{_PAD}{_OPEN}{i}{c}{_CLOSE}{_PAD}" for c, k in _KEYS.items() if message.get(k)}
        shown.append({**message, **stand_ins})
    stand_in = Conversation(shown, None, conversation.template)
    located = _located(stand_in, wanted, bodies)
    fields = list(_FIELD.finditer(located.text))
    if len({m.group(2, 3) for m in fields}) < len(fields) or located.text.count(_OPEN) != len(fields):
        return None  # words that are written twice, or not as they stand
    gaps = [located.text[a:b] for a, b in _between(fields, len(located.text))]
    cuts = []
    for place in located.places:
        if any(place.begin <= m.start() < place.end and int(m[2]) != place.index for m in fields):
            return None
        corners = [_corner(at, fields, len(located.text)) for at in (place.begin, place.body, place.end)]
        if None in corners:
            return None
        cuts.append((place.index, *corners))
    words = [(int(m[2]), _KEYS[m[3]], not m[1], not m[4]) for m in fields]
    return _Shape(gaps, words, cuts, located.notes)  # type: ignore[arg-type]


def _between(fields: Sequence[re.Match[str]], length: int) -> list[tuple[int, int]]:
    edges = [0, *(at for m in fields for at in m.span()), length]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _corner(at: int, fields: Sequence[re.Match[str]], length: int) -> tuple[int, int] | None:
    for number, (begin, end) in enumerate(_between(fields, length)):
        if begin <= at <= end:
            return number, at - begin
    return None


# Proofs of one turn


def _place(conversation: Conversation, text: str, index: int, bodies: bool) -> Place:
    if conversation.messages[index]["role"] == "assistant":
        return _written(conversation, text, index, bodies)
    return _given(conversation, text, index)


def _written(conversation: Conversation, text: str, index: int, bodies: bool) -> Place:
    """A turn that the model is asked for: from the generation prompt on, to the end of what stops it."""
    turn = index + 1
    if index == 0:
        raise UserError(f"turn {turn}: the conversation begins with an assistant turn, so nothing asks for it.")
    before = conversation.text(index, generation=True)
    through = conversation.text(turn)
    stop = _stop(conversation, index)
    if not (text.startswith(through) and through.startswith(before)):
        return _written_among_others(conversation, text, index, stop, bodies)
    end = len(through.rstrip())  # white space after the stop token (ChatML's newline) is not written by the model
    return Place(turn - 1, len(before), _body(through[len(before) : end], stop, turn, bodies) + len(before), end)


def _written_among_others(conversation: Conversation, text: str, index: int, stop: str, bodies: bool) -> Place:
    """As `_written`, where the template writes earlier turns, or this one, otherwise once later turns follow."""
    turn = index + 1
    before, through = conversation.text(index, generation=True), conversation.text(turn)
    words = _stretch(text, conversation.text(changed=index), conversation.messages[index], turn)
    asker = conversation.messages[index - 1]
    after_asker = _stretch(text, conversation.text(changed=index - 1), asker, index)[1]
    asked = before[_stretch(before, conversation.text(index, generation=True, changed=index - 1), asker, index)[1] :]
    begin = after_asker + len(asked)
    if not text.startswith(asked, after_asker) or begin > words[0]:
        raise UserError(
            f"turn {turn}: the chat template's generation prompt is not how the turn begins (it asks with "
            f"{_short(asked)} and writes {_short(text[after_asker : words[0]])}), so the model would learn to begin as "
            f"it is never asked to. Use another data.chat_template."
        )
    alone = _stretch(through, conversation.text(turn, changed=index), conversation.messages[index], turn)
    tail = through[alone[1] :].rstrip()
    if not text.startswith(tail, words[1]):
        raise UserError(
            f"turn {turn}: the chat template ends the turn otherwise once later turns follow ({_short(tail)}, then "
            f"{_short(text[words[1] : words[1] + len(tail)])}), so what stops it cannot be proven. {_OTHER}"
        )
    end = words[1] + len(tail)
    return Place(index, begin, _body(text[begin:end], stop, turn, bodies) + begin, end)


def _given(conversation: Conversation, text: str, index: int) -> Place:
    """A turn of another role: its words, and what the template writes after them when nothing follows."""
    turn, message = index + 1, conversation.messages[index]
    fix = f"Remove {message['role']} from data.train_roles."
    begin, body = _stretch(text, conversation.text(changed=index), message, turn, fix)
    toolless = Conversation(conversation.messages[:turn], None, conversation.template)  # they may follow the words
    alone = toolless.text()
    tail = alone[_stretch(alone, toolless.text(changed=index), message, turn, fix)[1] :].rstrip()
    if not text.startswith(tail, body):
        raise UserError(
            f"turn {turn}: the chat template ends the {message['role']} turn otherwise once later turns or tools "
            f"follow, so what is trained cannot be proven. {fix}"
        )
    return Place(index, begin, body, body + len(tail))


def _body(written: str, stop: str, turn: int, bodies: bool) -> int:
    """Length of what is written without what ends it."""
    if not stop:
        raise UserError(
            f"turn {turn}: the chat template writes no stop token after an assistant turn, so the model would never "
            f"learn to stop. Add {{{{ eos_token }}}} after it in data.chat_template."
        )
    if written.endswith(stop):
        return len(written) - len(stop)
    if bodies:
        raise UserError(
            f"turn {turn}: the chat template does not end this turn with {_short(stop)} as it does others, so what "
            f"train_end_of_turn=false leaves out cannot be proven. Set train_end_of_turn=true."
        )
    return len(written)


def _stop(conversation: Conversation, index: int) -> str:
    """What follows the words of an assistant's last turn, without white space at its end; remembered by the roles."""
    roles = tuple(m["role"] for m in conversation.messages[max(0, index - 1) : index + 1])

    def find() -> str:
        turn = {"role": roles[-1], "content": f"{_FROM}{_TO}"}
        probe = Conversation([*conversation.messages[:index], turn], conversation.tools, conversation.template)
        return probe.text().rpartition(_TO)[2].rstrip()

    return str(_remembered(conversation.template, ("stop", roles, bool(conversation.tools)), find))


def _stretch(text: str, changed: str, message: Message, turn: int, fix: str = _OTHER) -> tuple[int, int]:
    """The one stretch of `text` that changes with a turn's words, proven to hold them as they stand."""
    begin = _common(text, changed)
    after = _common(text[begin:][::-1], changed[begin:][::-1])
    end, words = len(text) - after, changed[begin : len(changed) - after]
    simple = not (message.get("tool_calls") or message.get("reasoning_content") or _THOUGHT.match(message["content"]))
    if words.startswith(_FROM) and _TO in words:
        found = text[begin:end]
        if not simple or (words.endswith(_TO) and words.count(_FROM) == 1 and found in message["content"]):
            return begin, end
    raise UserError(
        f"turn {turn}: its words do not make exactly one stretch of the text that the chat template writes, as they "
        f"stand, so which tokens are trained cannot be proven. {fix}"
    )


def _alternative(message: Message) -> dict[str, Any]:
    """The message with stand-ins for all of its words; marks of reasoning inside of the content stay."""
    other = f"{_FROM}{_TO}"
    changed = {**message, **{key: other for key in _KEYS.values() if message.get(key)}}
    if thought := _THOUGHT.match(message["content"]):
        before, reasoning, between, rest = thought.groups()
        changed["content"] = before + (other if reasoning else "") + between + (other if rest else "")
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_other_call(call, other, other) for call in calls]
    return changed


def _other_call(call: Any, name: str, argument: str) -> Any:
    function = call["function"]
    arguments = {argument: argument} if function.get("arguments") else function.get("arguments")
    return {**call, "function": {**function, "name": name, "arguments": arguments}}


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


# Blocks that the template itself marks


def _marked(conversation: Conversation, text: str) -> dict[int, Place]:
    """Assistant turns by the template's `{% generation %}` blocks; none where these are not one for each turn."""
    whole, blocks = conversation.template.marked(conversation.messages, tools=conversation.tools)
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if whole != text or len(blocks) != len(turns):
        return {}
    places = {}
    for index, (begin, close) in zip(turns, blocks, strict=True):
        message, written = conversation.messages[index], text[begin:close]
        content, stop = message["content"].strip(), _stop(conversation, index)
        at = written.rfind(content)
        if at < 0 and not message.get("tool_calls"):
            return {}
        length = len(written.rstrip())
        if message.get("tool_calls") or not content:
            body = length - len(stop) if stop and written[:length].endswith(stop) else length
        else:
            body = at + len(content)
        places[index] = Place(index, begin, begin + body, begin + max(body, length))
    return places


# What a template leaves out


def _left_out(conversation: Conversation, text: str) -> list[str]:
    """Refuse a template that does not write a part of the conversation; says what it leaves out by its own design.

    Judged once for each shape, on stand-ins; where the template does not take these, on the conversation itself.
    """
    key = ("whole", len(conversation.tools or ()), *(_outline(message) for message in conversation.messages))
    missing: list[tuple[int, str]] = _remembered(conversation.template, key, lambda: _missing(conversation, text))
    notes = []
    for index, what in missing:
        if index == -1:
            raise UserError(
                "the chat template does not write the tools of the conversation, so the model would learn calls of "
                "functions it was never shown. Set data.chat_template to one that does, or leave the column out."
            )
        message = conversation.messages[index]
        if what == "reasoning_content":
            notes += [REASONING_LEFT_OUT] if index == _last(conversation.messages) else []
        elif what == "content" and message.get("tool_calls"):
            notes.append(CONTENT_LEFT_OUT)
        else:
            part = "tool calls" if what == "calls" else "words"
            raise UserError(
                f"turn {index + 1}: the chat template does not write the {part} of a turn of role {message['role']}, "
                f"so they would be lost. Set data.chat_template to one that does."
            )
    return list(dict.fromkeys(notes))


def _is_thought_left_out(messages: Sequence[Message], text: str) -> bool:
    """Whether the last answer's reasoning, where it lies inside of its content, is not in the text."""
    last = _last(messages)
    thought = _THOUGHT.match(messages[last]["content"]) if last >= 0 else None
    return thought is not None and thought[2] not in text


def _last(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def _outline(message: Message) -> tuple[Any, ...]:
    parts = (bool(message["content"].strip()), bool(message.get("reasoning_content")))
    return (message["role"], *parts, len(message.get("tool_calls") or ()))


def _missing(conversation: Conversation, text: str) -> list[tuple[int, str]]:
    """(turn, key) of what is not in the text; turn -1 are the tools."""
    names: list[tuple[int, str, str]] = []
    messages = []
    for i, message in enumerate(conversation.messages):
        words = {key: f"Qz{i}{c}zQ" for c, key in _KEYS.items() if (message.get(key) or "").strip()}
        names += [(i, key, word) for key, word in words.items()]
        changed = {**message, **words}
        if calls := message.get("tool_calls"):
            names += [(i, "calls", f"Qz{i}n{j}zQ") for j in range(len(calls))]
            changed["tool_calls"] = [_other_call(call, f"Qz{i}n{j}zQ", "Qzq") for j, call in enumerate(calls)]
        messages.append(changed)
    tools = [_renamed(tool, f"Qzt{j}zQ") for j, tool in enumerate(conversation.tools or ())]
    names += [(-1, "tools", f"Qzt{j}zQ") for j in range(len(tools))]
    try:
        whole = conversation.template.render(messages, tools=tools or None)
        return [(i, key) for i, key, word in names if word not in whole]
    except UserError:
        return [
            (i, key)
            for i, key, _ in names
            if i >= 0 and key in _KEYS.values() and not _holds(text, i, key, conversation)
        ]


def _holds(text: str, index: int, key: str, conversation: Conversation) -> bool:
    words = conversation.messages[index][key].strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _renamed(tool: Any, name: str) -> Any:
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}
