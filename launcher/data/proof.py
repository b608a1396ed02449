"""Proves where a turn lies in the text that a chat template makes of a conversation; what cannot be proven is refused.

Two proofs, the first that holds is taken. *By beginnings*: what the template writes for the turns before, with its
generation prompt, and for the turns up to it both begin the whole text. *By alternatives*, for templates that rewrite
earlier turns: stand-ins take the place of a turn's words, and of those of the turn before it; exactly one stretch of
the text changes, after it comes the text that ends a turn, before it the generation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.data.left_out import THOUGHT, WORDS, left_out, other_call
from launcher.data.template import Template
from launcher.errors import UserError
from launcher.shipped import chat_templates

Message = Mapping[str, Any]

_FROM, _TO = "\ue002", "\ue003"  # around stand-ins; private use, so no template writes them
MARKS_UNUSED = "{% generation %} blocks that are not one for each answer with its words: not used, the mask is proven"
_OTHER = "Use data.train_on=last_assistant or another data.chat_template."


@dataclass(frozen=True, slots=True)
class Place:
    """Characters begin:end of the text are what is written as turn `index`, from 0; from `body` on it only ends."""

    index: int
    begin: int
    body: int
    end: int


@dataclass(frozen=True, slots=True)
class Located:
    """A conversation's text, the turns that were asked for, and what is to be counted of it."""

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

    def stretch(self, index: int, count: int | None = None, *, generation: bool = False) -> tuple[int, int] | None:
        """The one stretch of a `text` that changes with the words of turn `index`, and holds them as they stand."""
        text = self.text(count, generation=generation)
        changed = self.text(count, generation=generation, changed=index)
        begin = _common(text, changed)
        after = _common(text[begin:][::-1], changed[begin:][::-1])
        end, words, message = len(text) - after, changed[begin : len(changed) - after], self.messages[index]
        if not (words.startswith(_FROM) and _TO in words):
            return None
        if message.get("tool_calls") or message.get("reasoning_content") or _thought(message):
            return begin, end
        whole = words.endswith(_TO) and words.count(_FROM) == 1 and _holds(message["content"], text[begin:end])
        return (begin, end) if whole else None

    def toolless(self, count: int) -> Conversation:
        """The first `count` turns without tools."""
        return type(self)(self.messages[:count], None, self.template)


def prove(conversation: Conversation, wanted: Sequence[int], *, bodies: bool) -> Located:
    """Where the `wanted` turns of a conversation lie in its text.

    Args:
        bodies: whether it matters where a turn's words end and what ends it begins.
    Raises:
        UserError: a turn cannot be proven, or the template leaves out a part of the conversation.
    """
    text = conversation.text()
    notes = left_out(conversation.messages, conversation.tools, conversation.template, text)
    marked = _marked(conversation, text) if conversation.template.marks and wanted else {}
    if conversation.template.marks and any(_by_the_model(conversation, i) and i not in marked for i in wanted):
        notes.append(MARKS_UNUSED)
    places = [marked[i] if i in marked else _place(conversation, text, i, bodies) for i in wanted]
    return Located(text, places, notes)


def _by_the_model(conversation: Conversation, index: int) -> bool:
    return str(conversation.messages[index]["role"]) == "assistant"


def _place(conversation: Conversation, text: str, index: int, bodies: bool) -> Place:
    if _by_the_model(conversation, index):
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
    if not stop:
        raise UserError(
            f"turn {turn}: the chat template writes no stop token after an assistant turn, so the model would never "
            f"learn to stop. Add {{{{ eos_token }}}} after it in data.chat_template."
        )
    if header := _unasked(conversation, index):
        raise UserError(
            f"turn {turn}: the chat template writes {_short(header)} before an assistant turn but has no generation "
            f"prompt, so the model would learn to write that itself. End data.chat_template with "
            f"{{% if add_generation_prompt %}} ... {{% endif %}} that writes it, or use another; shipped are "
            f"{', '.join(chat_templates())}."
        )
    if not (text.startswith(through) and through.startswith(before)):
        return _written_among_others(conversation, text, index, stop, bodies)
    end = len(through.rstrip())  # white space after the stop token (ChatML's newline) is not written by the model
    return Place(turn - 1, len(before), _body(through[len(before) : end], stop, turn, bodies) + len(before), end)


def _written_among_others(conversation: Conversation, text: str, index: int, stop: str, bodies: bool) -> Place:
    """As `_written`, where the template writes earlier turns, or this one, otherwise once later turns follow."""
    turn = index + 1
    before, through = conversation.text(index, generation=True), conversation.text(turn)
    words = _stretch(conversation, index)
    after_asker = _stretch(conversation, index - 1)[1]
    asked = before[_stretch(conversation, index - 1, index, generation=True)[1] :]
    begin = after_asker + len(asked)
    if not text.startswith(asked, after_asker) or begin > words[0]:
        raise UserError(
            f"turn {turn}: the chat template's generation prompt is not how the turn begins (it asks with "
            f"{_short(asked)} and writes {_short(text[after_asker : words[0]])}), so the model would learn to begin as "
            f"it is never asked to. {_fix(conversation, index)}"
        )
    tail = through[_stretch(conversation, index, turn)[1] :].rstrip()
    if not text.startswith(tail, words[1]):  # Phi 3 writes the end token once, after the whole
        tail = tail.removesuffix(conversation.template.end_token or tail).rstrip() or tail
    if not (tail and text.startswith(tail, words[1])):
        raise UserError(
            f"turn {turn}: the chat template ends the turn otherwise once later turns follow ({_short(tail)}, then "
            f"{_short(text[words[1] : words[1] + len(tail)])}), so what stops it cannot be proven. "
            f"{_fix(conversation, index)}"
        )
    end = words[1] + len(tail)
    called = conversation.messages[index].get("tool_calls")
    body = _body(text[begin:end], stop, turn, bodies) + begin if called else words[1]
    return Place(index, begin, body, end)


def _fix(conversation: Conversation, index: int) -> str:
    """What helps where a turn cannot be proven."""
    last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    if index < last:
        try:
            _written(conversation, conversation.text(), last, False)
            return "The last answer can be proven: use data.train_on=last_assistant, or another data.chat_template."
        except UserError:
            pass
    return f"Use another data.chat_template; shipped are {', '.join(chat_templates())}."


def _given(conversation: Conversation, text: str, index: int) -> Place:
    """A turn of another role: its words, and what the template writes after them when nothing follows."""
    turn, message = index + 1, conversation.messages[index]
    fix = f"Remove {message['role']} from data.train_roles."
    begin, body = _stretch(conversation, index, fix=fix)
    alone = conversation.toolless(turn)  # tools may follow the words
    tail = alone.text()[_stretch(alone, index, fix=fix)[1] :].rstrip()
    if not text.startswith(tail, body):
        raise UserError(
            f"turn {turn}: the chat template ends the {message['role']} turn otherwise once later turns or tools "
            f"follow, so what is trained cannot be proven. {fix}"
        )
    return Place(index, begin, body, body + len(tail))


def _body(written: str, stop: str, turn: int, bodies: bool) -> int:
    """Length of what is written without what ends it."""
    if written.endswith(stop):
        return len(written) - len(stop)
    if bodies:
        raise UserError(
            f"turn {turn}: the chat template does not end this turn with {_short(stop)} as it does others, so what "
            f"train_end_of_turn=false leaves out cannot be proven. Set train_end_of_turn=true."
        )
    return len(written)


def _unasked(conversation: Conversation, index: int) -> str:
    """What stands before an assistant's words though nothing asks for it; remembered by the roles.

    White space is not meant: Mistral's answers begin with a space that the model writes.
    """
    roles = tuple(m["role"] for m in conversation.messages[max(0, index - 1) : index + 1])

    def find() -> str:
        before = conversation.text(index)
        if conversation.text(index, generation=True) != before:
            return ""
        turn = {"role": roles[-1], "content": f"{_FROM}{_TO}"}
        probe = Conversation([*conversation.messages[:index], turn], conversation.tools, conversation.template)
        whole = probe.text()
        if whole.startswith(before):
            return whole[len(before) :].partition(_FROM)[0]
        after, asked = _stretch(probe, index - 1)[1], _stretch(conversation, index - 1, index)[1]
        return whole[after:].partition(_FROM)[0].removeprefix(before[asked:])

    header = str(conversation.template.remembered(("unasked", roles, bool(conversation.tools)), find))
    return header if header.strip() else ""


def _stop(conversation: Conversation, index: int) -> str:
    """What follows the words of an assistant's last turn, without white space at its end; remembered by the roles."""
    roles = tuple(m["role"] for m in conversation.messages[max(0, index - 1) : index + 1])

    def find() -> str:
        turn = {"role": roles[-1], "content": f"{_FROM}{_TO}"}
        probe = Conversation([*conversation.messages[:index], turn], conversation.tools, conversation.template)
        return probe.text().rpartition(_TO)[2].rstrip()

    return str(conversation.template.remembered(("stop", roles, bool(conversation.tools)), find))


def _stretch(
    conversation: Conversation, index: int, count: int | None = None, *, generation: bool = False, fix: str = _OTHER
) -> tuple[int, int]:
    found = conversation.stretch(index, count, generation=generation)
    if found is None:
        raise UserError(
            f"turn {index + 1}: its words do not make exactly one stretch of the text that the chat template writes, "
            f"as they stand, so which tokens are trained cannot be proven. {fix}"
        )
    return found


def _alternative(message: Message) -> dict[str, Any]:
    """The message with stand-ins for all of its words; marks of reasoning inside of the content stay."""
    other = f"{_FROM}{_TO}"
    changed = {**message, **{key: other for key in WORDS if message.get(key)}}
    if thought := _thought(message):
        before, reasoning, between, rest = thought
        changed["content"] = before + (other if reasoning else "") + between + (other if rest else "")
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_other_call(call, other) for call in calls]
    return changed


def _thought(message: Message) -> tuple[str, ...] | None:
    """An answer's content as (mark, reasoning, mark, words), where it holds reasoning."""
    found = THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
    return found.groups() if found is not None and (found[2] or found[4]) else None


def _other_call(call: Any, words: str) -> Any:
    """With other arguments; where there are none with another name, which a template may write with results, too."""
    function = call["function"]
    return other_call(call, function["name"] if function.get("arguments") else words, {words: words})


def _holds(content: str, found: str) -> bool:
    return found in content or found in json.dumps(
        content, ensure_ascii=False
    )  # a tool's result may be written as JSON


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
