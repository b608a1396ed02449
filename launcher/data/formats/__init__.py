"""How a record is read: its columns become a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.data.formats.examples import Chat, Completion, Example, Labelled, Note, Pair, Skip, Text, Tokens
from launcher.errors import UserError, nearest
from launcher.recipe.schema.data import Source

__all__ = ["Chat", "Completion", "Example", "Format", "Labelled", "Note", "Pair", "Skip", "Text", "Tokens", "choose"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# format -> (columns a record must have, columns it may have)
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
}
_TAGS = ("role_tag", "content_tag", "system_tag", "user_tag", "assistant_tag")
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
_NOT_READ = (
    "tools",
    "images",
    "videos",
    "audios",
)  # columns that a chat record cannot lose without changing its meaning
_NOT_READ_IN_MESSAGE = ("tool_calls", "images", "train", "weight", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Format:
    """How the records of one source are read.

    name: messages, sharegpt, alpaca, prompt_completion or text
    columns: our name -> the file's, for every column of the format
    tags: role_tag, content_tag and the roles' own names
    recognised: whether `auto` found the name
    """

    name: str
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    recognised: bool
    warnings: list[str] = field(default_factory=list)

    def read(self, record: Mapping[str, Any], note: Note = lambda reason: None) -> Example:
        """One record as an example.

        Raises:
            UserError: a column is missing, or is not what the format says; the caller adds file and record.
        """
        return _READERS[self.name](self, record)


def choose(
    source: Source, columns: Sequence[str], first: Mapping[str, Any], placeholders: Mapping[str, str] | None = None
) -> Format:
    """The format of a source: what the recipe says, or what the columns of its first record show.

    Raises:
        UserError: no format or several fit, or `columns` and `tags` name what the format has not.
    """
    mapping = dict(source.columns or {})
    if source.format != "auto":
        return _format(source, source.format, mapping, recognised=False)
    if preference := [
        c for c in columns if c in ("chosen", "rejected") or (c == "label" and isinstance(first[c], bool))
    ]:
        raise UserError(
            f"{source.path}: column {preference[0]} makes these preference records, which hold bad answers, too. "
            f"Set format to read the conversations as they stand."
        )
    found = _candidates(mapping, columns, first)
    if len(found) != 1:
        seen = f"columns {', '.join(columns)}"
        said = f"fit several formats: {', '.join(sorted(found))}" if found else f"fit no format ({_expectations()})"
        raise UserError(
            f"{source.path}: {seen} {said}. Set format, and columns: {{our name: the file's}} where names differ."
        )
    ((name, implied),) = found.items()
    return _format(source, name, {**implied, **mapping}, recognised=True)


def _candidates(
    mapping: Mapping[str, str], columns: Sequence[str], first: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Formats that fit, each with the column names that its messages imply."""
    found: dict[str, dict[str, str]] = {}
    for name, (required, optional) in COLUMNS.items():
        if name in ("messages", "sharegpt") or not set(mapping) <= {*required, *optional}:
            continue
        if all(mapping.get(column, column) in columns for column in required):
            found[name] = {}
    for ours in ("messages", "conversations"):
        theirs = mapping.get(ours, ours)
        keys = _message_keys(first.get(theirs)) if theirs in columns else set()
        if keys >= {"role", "content"}:
            found["messages"] = {"messages": theirs}
        elif keys >= {"from", "value"}:
            found["sharegpt"] = {"conversations": theirs}
    return found


def _message_keys(value: Any) -> set[str]:
    return set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else set()


def _expectations() -> str:
    return "; ".join(f"{name}: {' + '.join(required)}" for name, (required, _) in COLUMNS.items())


def _format(source: Source, name: str, mapping: Mapping[str, str], *, recognised: bool) -> Format:
    required, optional = COLUMNS[name]
    for key in mapping:
        if key not in (*required, *optional) and not (recognised and key in ("messages", "conversations")):
            raise UserError(
                f"{source.path}: columns.{key}: format {name} has no such column, expected "
                f"{', '.join((*required, *optional))}. {nearest(key, (*required, *optional))}"
            )
    tags = dict(source.tags or {})
    for key in tags:
        if key not in _TAGS:
            raise UserError(f"{source.path}: tags.{key}: expected {', '.join(_TAGS)}. {nearest(key, _TAGS)}")
    if tags and name not in ("messages", "sharegpt"):
        raise UserError(f"{source.path}: tags are for formats messages and sharegpt, not {name}. Remove them.")
    return Format(name, {c: mapping.get(c, c) for c in (*required, *optional)}, tags, recognised)


def _read_messages(form: Format, record: Mapping[str, Any]) -> Chat:
    _refuse_unread(record)
    role_tag, content_tag = form.tags.get("role_tag", "role"), form.tags.get("content_tag", "content")
    roles = {role: role for role in ROLES} | _tagged_roles(form)
    messages = _list(record, form.columns["messages"])
    return Chat([_message(m, i, role_tag, content_tag, roles) for i, m in enumerate(messages)])


def _read_sharegpt(form: Format, record: Mapping[str, Any]) -> Chat:
    _refuse_unread(record)
    role_tag, content_tag = form.tags.get("role_tag", "from"), form.tags.get("content_tag", "value")
    tagged = _tagged_roles(form)
    roles = {tag: role for tag, role in _SHAREGPT_ROLES.items() if role not in tagged.values()} | tagged
    turns = _list(record, form.columns["conversations"])
    messages = [_message(m, i, role_tag, content_tag, roles) for i, m in enumerate(turns)]
    system = _optional(record, form.columns["system"])
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages)


def _read_alpaca(form: Format, record: Mapping[str, Any]) -> Chat:
    instruction, output = _text(record, form.columns["instruction"]), _text(record, form.columns["output"])
    given, system = _optional(record, form.columns["input"]), _optional(record, form.columns["system"])
    messages = [{"role": "system", "content": system}] if system else []
    for i, pair in enumerate(record.get(form.columns["history"]) or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"column {form.columns['history']}: entry {i} is not a pair of texts [question, answer].")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n{given}" if given else instruction
    return Chat([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}])


def _read_completion(form: Format, record: Mapping[str, Any]) -> Completion:
    return Completion(_text(record, form.columns["prompt"]), _text(record, form.columns["completion"]))


def _read_text(form: Format, record: Mapping[str, Any]) -> Text:
    return Text(_text(record, form.columns["text"]))


_READERS: dict[str, Callable[[Format, Mapping[str, Any]], Example]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_completion,
    "text": _read_text,
}


def _tagged_roles(form: Format) -> dict[str, str]:
    return {form.tags[f"{role}_tag"]: role for role in ("system", "user", "assistant") if f"{role}_tag" in form.tags}


def _message(message: Any, turn: int, role_tag: str, content_tag: str, roles: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UserError(
            f"turn {turn + 1}: is {_kind(message)}, expected a message with '{role_tag}' and '{content_tag}'."
        )
    if message.get(role_tag) is None:
        raise UserError(f"turn {turn + 1}: '{role_tag}' is null or missing, expected {', '.join(roles)}.")
    role, content = message[role_tag], message.get(content_tag)
    if role not in roles:
        raise UserError(
            f"turn {turn + 1}: unknown role '{role}', expected {', '.join(roles)}. {nearest(str(role), roles)}"
        )
    for key in _NOT_READ_IN_MESSAGE:
        if message.get(key) is not None:
            raise UserError(
                f"turn {turn + 1}: '{key}' is not supported; only '{role_tag}' and '{content_tag}' are read."
            )
    if not isinstance(content, str):
        raise UserError(f"turn {turn + 1}: '{content_tag}' is {_kind(content)}, expected text.")
    return {"role": roles[role], "content": content}


def _refuse_unread(record: Mapping[str, Any]) -> None:
    for column in _NOT_READ:
        if record.get(column) not in (None, [], "", "[]"):
            raise UserError(f"column {column} is not supported: the conversation would be learnt without it.")


def _list(record: Mapping[str, Any], column: str) -> list[Any]:
    value = _present(record, column)
    if not isinstance(value, list):
        raise UserError(f"column {column} is {_kind(value)}, expected a list of messages.")
    return value


def _text(record: Mapping[str, Any], column: str) -> str:
    value = _present(record, column)
    if not isinstance(value, str):
        raise UserError(f"column {column} is {_kind(value)}, expected text.")
    return value


def _optional(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {column} is {_kind(value)}, expected text.")
    return value or ""


def _present(record: Mapping[str, Any], column: str) -> Any:
    if record.get(column) is None:
        has = ", ".join(name for name, value in record.items() if value is not None) or "nothing"
        # a table has every column in every row: a key that one record lacks is read as null, too
        what = "has the value null in this record, or is not in it" if column in record else "is missing"
        raise UserError(f"column {column} {what} (the record has {has}).")
    return record[column]


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
