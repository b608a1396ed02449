"""What a chat template leaves out of a conversation: refused where it would be lost, counted where it is its design."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.data.template import Template
from launcher.errors import UserError

Message = Mapping[str, Any]

WORDS = ("content", "reasoning_content")
REASONING_LEFT_OUT = "reasoning that the chat template leaves out"
CONTENT_LEFT_OUT = "words beside tool calls that the chat template leaves out"
THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)  # reasoning inside of the content


def left_out(messages: Sequence[Message], tools: Any, template: Template, text: str) -> list[str]:
    """Refuse a template that does not write a part of the conversation; says what it leaves out by its own design.

    Judged once for each shape, on stand-ins; where the template does not take these, on the conversation itself.
    """
    key = ("whole", len(tools or ()), *(_outline(message) for message in messages))
    missing: list[tuple[int, str]] = template.remembered(key, lambda: _missing(messages, tools, template, text))
    notes = []
    for index, what in missing:
        if index == -1:
            raise UserError(
                "the chat template does not write the tools of the conversation, so the model would learn calls of "
                "functions it was never shown. Set data.chat_template to one that does, or leave the column out."
            )
        message = messages[index]
        if what == "reasoning_content":
            notes += [REASONING_LEFT_OUT] if index == _last(messages) else []
        elif what == "content" and message.get("tool_calls"):
            notes.append(CONTENT_LEFT_OUT)
        else:
            part = "tool calls" if what == "calls" else "words"
            raise UserError(
                f"turn {index + 1}: the chat template does not write the {part} of a turn of role {message['role']}, "
                f"so they would be lost. Set data.chat_template to one that does."
            )
    last = _last(messages)
    thought = THOUGHT.match(messages[last]["content"]) if last >= 0 else None
    if thought is not None and thought[2] not in text:
        notes.append(REASONING_LEFT_OUT)
    return list(dict.fromkeys(notes))


def _last(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def _outline(message: Message) -> tuple[Any, ...]:
    return (message["role"], *(key for key in WORDS if message.get(key)), len(message.get("tool_calls") or ()))


def _missing(messages: Sequence[Message], tools: Any, template: Template, text: str) -> list[tuple[int, str]]:
    """(turn, key) of what is not in the text; turn -1 are the tools."""
    names: list[tuple[int, str, str]] = []
    shown = []
    for i, message in enumerate(messages):
        words = {key: f"Qz{i}{key[0]}zQ" for key in WORDS if (message.get(key) or "").strip()}
        names += [(i, key, word) for key, word in words.items()]
        changed = {**message, **words}
        if calls := message.get("tool_calls"):
            names += [(i, "calls", f"Qz{i}n{j}zQ") for j in range(len(calls))]
            changed["tool_calls"] = [other_call(call, f"Qz{i}n{j}zQ", {"Qzq": "Qzq"}) for j, call in enumerate(calls)]
        shown.append(changed)
    renamed = [_renamed(tool, f"Qzt{j}zQ") for j, tool in enumerate(tools or ())]
    names += [(-1, "tools", f"Qzt{j}zQ") for j in range(len(renamed))]
    try:
        whole = template.render(shown, tools=renamed)
        return [(i, key) for i, key, word in names if word not in whole]
    except UserError:
        words_alone = [(i, key) for i, key, _ in names if key in WORDS]
        return [(i, key) for i, key in words_alone if not _holds(text, messages[i][key].strip())]


def _holds(text: str, words: str) -> bool:
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def other_call(call: Any, name: str, arguments: Any) -> Any:
    """A tool call with another name and, where it has some, other arguments."""
    function = call["function"]
    return {**call, "function": {**function, "name": name, "arguments": arguments if function.get("arguments") else {}}}


def _renamed(tool: Any, name: str) -> Any:
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}
