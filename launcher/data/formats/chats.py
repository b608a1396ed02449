"""Formats that are conversations: OpenAI's messages, sharegpt, alpaca, and the query/response family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.data.formats.examples import Chat, Note
from launcher.data.formats.turns import finish, read_tools
from launcher.data.formats.values import decoded, kind, listing, optional_text, shown, text
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.data.formats.form import Format

Turns = list[dict[str, Any]]


def conversation(messages: Turns, tools: list[dict[str, Any]] | None = None) -> Chat:
    """A conversation that can be learnt from; see `turns.finish`."""
    return Chat(finish(messages), tools)


def read_chat(form: Format, record: Mapping[str, Any], note: Note) -> Chat:
    """A list of messages, with a system text and tools beside it."""
    return conversation(chat_turns(form, record, note), tools_of(form, record))


def read_alpaca(form: Format, record: Mapping[str, Any], note: Note) -> Chat:
    """Instruction and input are the question, output the answer; earlier turns and a system text stand before them."""
    turns = [*alpaca_context(form, record), said("assistant", text(record, form.columns["output"]))]
    return conversation(turns, tools_of(form, record))


def read_query(form: Format, record: Mapping[str, Any], note: Note) -> Chat:
    """A question and its answer; or a list of {human, assistant}."""
    if "conversations" in form.columns:
        return conversation([*_system(form, record), *_exchanges(record, form.columns["conversations"])])
    turns = [*query_context(form, record), said("assistant", text(record, form.columns["response"]))]
    return conversation(turns, tools_of(form, record))


def chat_turns(form: Format, record: Mapping[str, Any], note: Note) -> Turns:
    """The turns of a list of messages; a first turn of the system outranks the system column."""
    column = form.columns["messages"]
    messages = form.reader.read(listing(record, column, "messages"), note)
    system = _system(form, record)
    if not (messages and messages[0]["role"] in ("system", "developer")):
        return [*system, *messages]
    if system and system[0]["content"] != messages[0]["content"]:
        note("the system column is not read: the conversation begins with a system message of its own")
    return messages


def alpaca_context(form: Format, record: Mapping[str, Any]) -> Turns:
    """System, history, and the question."""
    instruction = text(record, form.columns["instruction"])
    given = optional_text(record, form.columns.get("input"))
    question = f"{instruction}\n{given}" if given and instruction else given or instruction
    return [*_system(form, record), *history(form, record), said("user", question)]


def query_context(form: Format, record: Mapping[str, Any]) -> Turns:
    """System, history, and the question."""
    return [*_system(form, record), *history(form, record), said("user", text(record, form.columns["query"]))]


def history(form: Format, record: Mapping[str, Any]) -> Turns:
    """Earlier turns, from a list of pairs [question, answer]."""
    column = form.columns.get("history", "history")
    pairs = decoded(record.get(column) or [], f"column {column}")
    if not isinstance(pairs, list):
        raise UserError(f"column {column} is {kind(pairs)}, expected a list of pairs [question, answer].")
    turns: Turns = []
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(words, str) for words in pair)):
            raise UserError(f"column {column}: entry {i} is not a pair of texts [question, answer]: {shown(pair)}")
        turns += [said("user", pair[0]), said("assistant", pair[1])]
    return turns


def tools_of(form: Format, record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools column of a record, if it has one."""
    column = form.columns.get("tools", "tools")
    return read_tools(record.get(column), column)


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(form: Format, record: Mapping[str, Any]) -> Turns:
    system = optional_text(record, form.columns.get("system", "system"))
    return [said("system", system)] if system else []


def _exchanges(record: Mapping[str, Any], column: str) -> Turns:
    turns: Turns = []
    for i, entry in enumerate(listing(record, column, "{human, assistant}")):
        human, assistant = (entry.get("human"), entry.get("assistant")) if isinstance(entry, dict) else (None, None)
        if not isinstance(human, str) or not isinstance(assistant, str):
            raise UserError(f"column {column}: entry {i} is not {{human: text, assistant: text}}: {shown(entry)}")
        turns += [said("user", human), said("assistant", assistant)]
    return turns
