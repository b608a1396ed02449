"""How a list of messages is read: roles under all their names, parts, tool calls and results, reasoning, weights.

The result is the form that chat templates know: see `examples.Chat`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

from launcher.data.formats.examples import Note, Skip
from launcher.data.formats.values import decoded, kind, shown
from launcher.errors import UserError, nearest

_USUAL = ("user", "assistant", "tool", "human", "gpt", "function_call", "observation", "developer", "model")
CALL = "call"  # our name for a turn whose content is the JSON of tool calls; it becomes an assistant turn
ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant",
    "function_call": CALL, "tool_call": CALL,
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
    "ipython": "tool",
}  # fmt: skip
TAGS = {
    "system_tag": "system", "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "function_tag": CALL,
}  # fmt: skip
_TRAIN = ("train", "training", "loss")  # ours, Axolotl's usual one, ms-swift's
_WEIGHT = ("weight", "loss_weight", "loss_scale", "loss")  # ours and OpenAI's, LLaMA-Factory v1's, ms-swift's
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REFUSED = frozenset(
    {"images", "image", "videos", "video", "audios", "audio", "train_detail", "training_detail"}
)  # fmt: skip
_READ = frozenset({*_TRAIN, *_WEIGHT, *_REASONING, "tool_calls", "function_call", "name", "tool_call_id"}) | _REFUSED
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_TWICE = "two assistant turns in a row"


@dataclass(frozen=True, slots=True)
class Reader:
    """What the messages of one source are called.

    role, content: keys of a message
    roles: the file's name of a role -> ours
    """

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)

    @classmethod
    def of(cls, tags: Mapping[str, str], *, role: str, content: str) -> Reader:
        """With the names that `tags` gives; a role that is given a name loses its usual ones."""
        tagged = {tags[tag]: ours for tag, ours in TAGS.items() if tag in tags}
        roles = {theirs: ours for theirs, ours in ROLES.items() if ours not in tagged.values()} | tagged
        return cls(tags.get("role_tag", role), tags.get("content_tag", content), roles)

    def read(self, turns: Sequence[Any], note: Note = lambda reason: None) -> list[dict[str, Any]]:
        """All turns of a conversation.

        Args:
            note: told of the keys of messages that nothing reads.
        Raises:
            UserError: a turn cannot be read; names it, counted from 1.
        """
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns, 1):
            for message in self._turn(turn, f"turn {number}", note):
                _add(messages, message)
        return messages

    def _turn(self, turn: Any, place: str, note: Note) -> list[dict[str, Any]]:
        if not isinstance(turn, dict):
            raise UserError(f"{place}: is {kind(turn)}, expected a message with '{self.role}' and '{self.content}'.")
        role = self._role(turn, place)
        for key in _REFUSED & turn.keys():
            if turn[key] not in (None, [], "", {}):
                raise UserError(f"{place}: '{key}' is not supported; this trains on text. Leave such records out.")
        content = turn.get(self.content)
        if len(turn) == 2 and role != CALL and isinstance(content, str):
            return [{"role": role, "content": content}]
        known = _known(self.role, self.content)
        if not known.issuperset(turn):
            for key in sorted(turn.keys() - known):
                if turn[key] not in (None, "", [], {}):
                    note(_unread(key, known))
        message: dict[str, Any] = {"role": "assistant" if role == CALL else role, "content": ""}
        _keep_training(turn, message, place)
        results: list[dict[str, Any]] = []
        if role == CALL:
            message["tool_calls"] = _calls(content, place)
        elif isinstance(content, list) and role != "tool":
            results = _read_parts(content, message, place)
        else:
            message["content"] = self._words(content, turn, role, place)
        if given := turn.get("tool_calls") or turn.get("function_call"):
            if role != "assistant":
                raise UserError(f"{place}: only an assistant turn has tool_calls, not '{turn[self.role]}'.")
            message["tool_calls"] = [*message.get("tool_calls", []), *_calls(given, place)]
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
        _keep_reasoning(turn, message, place)
        return [*results, message] if not results or message["content"] else results

    def _role(self, turn: dict[str, Any], place: str) -> str:
        given = turn.get(self.role)
        role = self.roles.get(given) if isinstance(given, str) else None
        if role is not None:
            return role
        known = dict.fromkeys(name for name in ("system", *_USUAL, *self.roles) if name in self.roles)
        names = ", ".join(list(known)[:10]) + (" and others" if len(known) > 10 else "")
        if given is None:
            raise UserError(f"{place}: '{self.role}' is null or missing, expected one of {names}.")
        hint = nearest(str(given), self.roles)
        meant = next((ours for name, ours in self.roles.items() if f"'{name}'" in hint), "user")
        tag = next(tag for tag, ours in TAGS.items() if ours == meant)
        raise UserError(
            f"{place}: unknown role {shown(given)}, expected {names}. {f'{hint} Or name' if hint else 'Name'} it with "
            f"tags, as tags: {{{tag}: {shown(str(given))[1:-1]}}}."
        )

    def _words(self, content: Any, turn: Mapping[str, Any], role: str, place: str) -> str:
        if isinstance(content, str):
            return content
        if role == "tool":  # a result that is not text is shown to the model as JSON
            if content is None:
                raise UserError(f"{place}: '{self.content}' of a tool result is null, expected its text.")
            if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") in _TEXT_PARTS for p in content):
                return "".join(_part_text(part, place) for part in content)
            return json.dumps(content, ensure_ascii=False)
        if content is None and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
            return ""
        what = kind(content) if content is not None or self.content in turn else "missing"
        raise UserError(f"{place}: '{self.content}' is {what}, expected text. Fill it, or leave the record out.")


def finish(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that can be learnt from.

    Raises:
        Skip: nothing is said, or a trained assistant turn says nothing.
        UserError: a tool result stands where nothing can have been called.
    """
    if not messages:
        raise Skip("the conversation has no turn")
    for number, message in enumerate(messages):
        if message["role"] == "tool" and (number == 0 or messages[number - 1]["role"] not in ("assistant", "tool")):
            raise UserError(
                f"turn {number + 1}: a tool result must follow an assistant turn or another result, but "
                f"{'it is the first turn' if number == 0 else 'a ' + messages[number - 1]['role'] + ' turn is there'}."
            )
        if message["role"] == "assistant" and is_empty(message) and is_trained(message):
            raise Skip("an assistant turn is empty")
    return messages


def oddities(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is odd about the turns of a conversation that is still read, to be counted."""
    odd = list(_odd_order(tuple([message["role"] for message in messages])))
    if _TWICE in odd and not any(_follow(*both) for both in pairwise(messages)):
        odd.remove(_TWICE)
    for message in messages:
        if message["role"] == "user" and not message["content"].strip():
            return [*odd, "a user turn without words"]
    return odd


@lru_cache(4096)  # few orders are common
def _odd_order(roles: tuple[str, ...]) -> tuple[str, ...]:
    if "assistant" not in roles:
        return ()
    found = []
    if roles[-1] != "assistant":
        found.append(f"ends with a {'tool result' if roles[-1] == 'tool' else f'{roles[-1]} turn'}, nobody answers it")
    if ("user", "user") in pairwise(roles):
        found.append("two user turns in a row")
    return (*found, _TWICE) if ("assistant", "assistant") in pairwise(roles) else tuple(found)


def _follow(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two turns are answers in a row; words beside tool calls may be turns of their own."""
    calls = "tool_calls" in before or "tool_calls" in after
    return before["role"] == after["role"] == "assistant" and not calls


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn has no words, no reasoning and no tool call."""
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a turn may be trained, as far as it says itself."""
    return message.get("train", True) is not False and message.get("weight", 1) != 0


def read_tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Tool definitions of a record: a list, one object, or JSON text of either; None for none."""
    value = decoded(value, f"column {column}") if not isinstance(value, str) or value.strip() else None
    if value in (None, [], {}):
        return None
    return [_tool(tool, column) for tool in (value if isinstance(value, list) else [value])]


def _tool(tool: Any, column: str) -> dict[str, Any]:
    tool = decoded(tool, f"column {column}")
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise UserError(f"column {column}: {shown(tool)} is no tool: expected an object with a name and parameters.")
    return {"type": "function", "function": tool}


@cache
def _known(role: str, content: str) -> frozenset[str]:
    return _READ | {role, content}


@lru_cache(1024)
def _unread(key: str, known: frozenset[str]) -> str:
    hint = nearest(key, sorted(known - _REFUSED))
    return f"key {shown(key)} of a message is not read{f'. {hint}' if hint else ''}"


def _add(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Append; words followed by tool calls, or calls by calls, are one turn of the assistant, as OpenAI writes it."""
    last = messages[-1] if messages else {}
    joins = message.get("tool_calls") and not message["content"] and "reasoning_content" not in message
    same = last.get("role") == message["role"] == "assistant"
    if joins and same and all(last.get(key) == message.get(key) for key in ("train", "weight")):
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
    else:
        messages.append(message)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates know them, of OpenAI's form, of {name, arguments}, a list of them, or JSON text."""
    value = decoded(value, f"{place}: the tool call")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise UserError(f"{place}: the turn is a tool call, but the list of calls is empty.")
    return [_call(call, f"{place}: tool call {i}") for i, call in enumerate(calls, 1)]


def _call(call: Any, place: str) -> dict[str, Any]:
    call = decoded(call, place)
    body = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise UserError(f"{place}: {shown(call)} has no name; expected {{name, arguments}}.")
    arguments: Any = next((body[key] for key in ("arguments", "parameters", "input") if body.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = decoded(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise UserError(
            f'{place}: arguments are {kind(arguments)}, expected an object of names and values, as {{"city": "Rome"}}.'
        )
    made = {"type": "function", "function": {"name": body["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _read_parts(parts: list[Any], message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Fill a message from its parts; returns the tool results among them, which are turns of their own."""
    words, reasoning, results = [], [], []
    for part in parts:
        name = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            words.append(part)
        elif name in _TEXT_PARTS:
            words.append(_part_text(part, place))
        elif name in _REASONING_PARTS:
            reasoning.append(_part_text(part, place))
        elif name in ("tool_use", "tool_call"):
            message["tool_calls"] = [*message.get("tool_calls", []), *_calls(part.get("value", part), place)]
        elif name == "tool_result":
            results.append(_tool_result(part, place))
        else:
            what = f"a part of type {shown(name)}" if name else f"{shown(part)}"
            raise UserError(
                f"{place}: the content holds {what}, but this trains on text: only parts of type text, reasoning, "
                f"tool_use and tool_result are read. Leave such records out."
            )
    message["content"] = "".join(words)
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if not parts:
        raise UserError(f"{place}: the content is an empty list, expected text.")
    return results


def _tool_result(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    content = part.get("content", part.get("value"))
    if isinstance(content, list):
        content = "".join(_part_text(p, place) for p in content)
    result = {"role": "tool", "content": content if isinstance(content, str) else json.dumps(content)}
    return {**result, "tool_call_id": part["tool_use_id"]} if isinstance(part.get("tool_use_id"), str) else result


def _part_text(part: Any, place: str) -> str:
    keys = ("text", "value", "thinking", "reasoning")
    found = [part[key] for key in keys if isinstance(part, dict) and part.get(key) is not None]
    if not found or not isinstance(found[0], str):
        raise UserError(f"{place}: {shown(part)} is no part with a text.")
    return found[0]


def _keep_training(turn: Mapping[str, Any], message: dict[str, Any], place: str) -> None:
    for key in _TRAIN:
        if turn.get(key) is not None and not (key == "loss" and not isinstance(turn[key], bool)):
            if not isinstance(turn[key], bool):
                raise UserError(f"{place}: '{key}' is {shown(turn[key])}, expected true or false.")
            message["train"] = turn[key]
    for key in _WEIGHT:
        if turn.get(key) is not None and not (key == "loss" and isinstance(turn[key], bool)):
            weight = turn[key]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise UserError(f"{place}: '{key}' is {shown(weight)}, expected a number of 0 or more.")
            message["weight"] = float(weight)


def _keep_reasoning(turn: Mapping[str, Any], message: dict[str, Any], place: str) -> None:
    for key in _REASONING:
        if turn.get(key) not in (None, ""):
            if not isinstance(turn[key], str):
                raise UserError(f"{place}: '{key}' is {kind(turn[key])}, expected text.")
            if message["role"] != "assistant":
                raise UserError(f"{place}: only an assistant turn has '{key}', not '{message['role']}'.")
            message["reasoning_content"] = turn[key]
