"""LLaMA-Factory's registry of data sets: `dataset_info.json#name` means what it means there, and its traps are told.

Where that program changes or leaves out something without a word, a warning or a count says so here:
a `columns` or `tags` that is given names all that is read; turns that do not alternate leave their record out; records
of formatting openai without tools get a line in their system prompt there, which is not added here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError, nearest

if TYPE_CHECKING:
    from launcher.data.formats import Example, Format, Note

_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "messages": "conversations", "history": None,
    "system": None, "tools": None, "images": None, "videos": None, "audios": None, "chosen": None, "rejected": None,
    "kto_tag": None,
}  # fmt: skip
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
_KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_ASKS, _ANSWERS = ("user", "tool"), ("assistant", "call")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a registry.

    registry, name: where it stands, for messages
    formatting: alpaca, sharegpt or openai
    ranking: each record holds a chosen and a rejected answer
    columns, tags: LLaMA-Factory's name -> the file's; null where the entry names none
    given: which of columns and tags the entry has, so that what they do not name is not read
    num_samples: so many records, drawn by chance; more than there are repeats some
    """

    registry: str
    name: str
    formatting: str
    ranking: bool
    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]
    given: tuple[str, ...]
    num_samples: int | None

    @property
    def place(self) -> str:
        return f"{self.registry}#{self.name}"

    def form(self, columns: Sequence[str], first: Mapping[str, Any]) -> Format:
        """The format of its records.

        Raises:
            UserError: the file has not the columns that are named, or holds media.
        """
        from launcher.data.formats import Format

        needed = {"alpaca": ("prompt",)}.get(self.formatting, ("messages",))
        for key in (*needed, *(("chosen", "rejected") if self.ranking else ())):
            theirs = self.columns[key]
            if theirs is None:
                raise UserError(
                    f"{self.place}: `columns` names no {key}, and what a given `columns` does not name is null. Add "
                    f"{key}: {nearest_default(key, columns)}."
                )
            if theirs not in columns:
                raise UserError(
                    f"{self.place}: columns.{key} = {theirs}: the file has no such column, it has "
                    f"{', '.join(columns)}. {nearest(theirs, columns)}"
                )
        for key in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if self.formatting != "alpaca" and self.tags[key] is None:
                raise UserError(
                    f"{self.place}: `tags` names no {key}, and what a given `tags` does not name is null. Add "
                    f"{key}: {_TAGS[key]}."
                )
        read = {
            ours: name for ours, name in self.columns.items() if name and (self._expects(ours) or not _COLUMNS[ours])
        }
        tags = {tag: theirs for tag, theirs in self.tags.items() if theirs}
        style = "openai" if tags.get("role_tag") == "role" else "sharegpt"
        base = {"openai": "messages"}.get(self.formatting, self.formatting)
        name = "preference" if self.ranking else "unpaired" if self.columns["kto_tag"] else base
        if name == "alpaca" and not self.columns["response"]:
            name = "text"
        return Format(
            name, read, tags, warnings=self._warnings(), base=base if name in ("preference", "unpaired") else "",
            style=style, not_read=tuple(c for c in columns if c not in read.values()), entry=self,
        )  # fmt: skip

    def read(self, form: Format, record: Mapping[str, Any], note: Note) -> Example:
        """One record, as LLaMA-Factory would read it."""
        for key, default in _COLUMNS.items():
            if default and self.columns[key] is None and self._expects(key) and record.get(default):
                note(f"column {default} is not read: the entry's `columns` does not name {key}")
        for key in ("history", "system"):
            if key not in self.columns.values() and record.get(key):
                note(f"column {key} is not read: the entry's `columns` does not name it")
        return self._read_alpaca(form, record) if self.formatting == "alpaca" else self._read_turns(form, record, note)

    def _expects(self, key: str) -> bool:
        return (key == "messages") != (self.formatting == "alpaca")

    def _warnings(self) -> list[str]:
        warnings = []
        if "tags" in self.given and self.formatting != "alpaca":
            lost = [tag for tag in _TAGS if self.tags[tag] is None]
            if lost:
                warnings.append(
                    f"{self.place}: `tags` does not name {', '.join(lost)}, so records with such turns are left out"
                )
        if self.formatting == "openai":
            warnings.append(
                f"{self.place}: LLaMA-Factory writes 'detailed thinking off' into the system prompt of records without "
                f"tools; here they stay as they are"
            )
        if self.num_samples is not None:
            warnings.append(f"{self.place}: {self.num_samples} records are drawn by chance (num_samples)")
        return warnings

    def _read_alpaca(self, form: Format, record: Mapping[str, Any]) -> Example:
        from launcher.data.formats import Completion, Labelled, Pair, Skip, Text
        from launcher.data.formats.answers import checked_pair
        from launcher.data.formats.chats import conversation, history, said, tools_of
        from launcher.data.formats.values import optional_text

        asked = [optional_text(record, self.columns[key]) for key in ("prompt", "query")]
        question = "\n".join(words for words in asked if words)
        if not question:
            raise Skip("the prompt is empty")
        if form.name == "text":
            return Text(question)
        system = optional_text(record, self.columns["system"])
        before = [said("system", system)] if system else []
        before += [*(history(form, record) if self.columns["history"] else []), said("user", question)]
        tools = tools_of(form, record) if self.columns["tools"] else None
        if self.ranking:
            return checked_pair(before, self._text(record, "chosen"), self._text(record, "rejected"), tools)
        answer = record.get(self.columns["response"] or "")
        if not isinstance(answer, str) or not answer.strip():
            raise Skip("the response is empty")
        chat = conversation([*before, said("assistant", answer)], tools)
        assert not isinstance(chat, Completion | Pair)
        return Labelled(_last_trained(chat), self._good(record)) if form.name == "unpaired" else chat

    def _read_turns(self, form: Format, record: Mapping[str, Any], note: Note) -> Example:
        from launcher.data.formats import Labelled, Skip
        from launcher.data.formats.answers import checked_pair
        from launcher.data.formats.chats import conversation, said, tools_of
        from launcher.data.formats.values import listing, optional_text

        turns = listing(record, self.columns["messages"] or "", "messages")
        roles = self._roles()
        role_tag = self.tags["role_tag"] or ""
        given = [roles.get(turn.get(role_tag)) if isinstance(turn, dict) else None for turn in turns]
        system = [] if given[:1] == ["system"] else [optional_text(record, self.columns["system"])]
        order = self._order(turns[1:] if not system else turns, given[1:] if not system else given)
        if any(role not in (_ASKS, _ANSWERS)[i % 2] for i, role in enumerate(order)):
            raise Skip("turns do not alternate between user or observation and assistant or function, from the user on")
        if (len(order) % 2 == 0) if self.ranking else (len(order) % 2 == 1):
            end = "the user's" if self.ranking else "the assistant's"
            raise Skip(f"the last turn is not {end}")
        if not order:
            raise Skip("the conversation has no turn")
        messages = [*(said("system", words) for words in system if words), *form.reader.read(turns, note)]
        tools = tools_of(form, record) if self.columns["tools"] else None
        if self.ranking:
            answers = [self._answer(form, record, key, note) for key in ("chosen", "rejected")]
            return checked_pair(messages, answers[0], answers[1], tools)
        chat = conversation(messages, tools)
        return Labelled(_last_trained(chat), self._good(record)) if form.name == "unpaired" else chat

    def _roles(self) -> dict[str | None, str]:
        from launcher.data.formats.turns import TAGS

        return {self.tags[tag]: ours for tag, ours in TAGS.items() if self.tags[tag]}

    def _order(self, turns: Sequence[Any], roles: Sequence[str | None]) -> list[str | None]:
        """Roles as LLaMA-Factory counts them: for openai, tool results that follow each other are one turn."""
        if self.formatting != "openai":
            return list(roles)
        return [r for i, r in enumerate(roles) if not (r == "tool" and i and roles[i - 1] == "tool")]

    def _text(self, record: Mapping[str, Any], key: str) -> str:
        from launcher.data.formats.values import text

        return text(record, self.columns[key] or "")

    def _answer(self, form: Format, record: Mapping[str, Any], key: str, note: Note) -> list[dict[str, Any]]:
        from launcher.data.formats.values import kind, present

        column = self.columns[key] or ""
        value = present(record, column)
        if not isinstance(value, dict):
            raise UserError(f"column {column} is {kind(value)}, expected one message of the assistant.")
        return form.either_reader([value]).read([value], note)

    def _good(self, record: Mapping[str, Any]) -> bool:
        from launcher.data.formats.values import present, truth

        column = self.columns["kto_tag"] or ""
        return truth(present(record, column), f"column {column}")


def read_entry(registry: Path, name: str | None) -> tuple[Entry, dict[str, Any]]:
    """An entry by its name, and where its records lie: {path, split, subset, folder}.

    Raises:
        UserError: there is no such registry or entry, or it names what this program does not read.
    """
    entries = _load(registry)
    if not name or name not in entries:
        what = f"has no entry '{name}'" if name else "is a registry of data sets"
        names = ", ".join(list(entries)[:12]) + (f" and {len(entries) - 12} more" if len(entries) > 12 else "")
        hint = f" {h}" if (h := nearest(name or "", entries)) else ""
        if not entries:
            raise UserError(f"{registry}: the registry has no entries.")
        raise UserError(f"{registry}: {what}; name one as {registry.name}#name: {names}.{hint}")
    raw, place = entries[name], f"{registry}#{name}"
    if not isinstance(raw, dict):
        raise UserError(f"{place}: expected an object with file_name or hf_hub_url.")
    for key in raw:
        if key not in _KEYS:
            raise UserError(f"{place}: unknown key {key}, expected {', '.join(_KEYS)}. {nearest(key, _KEYS)}")
    formatting = raw.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{place}: formatting = {formatting}: expected alpaca, sharegpt or openai.")
    columns, tags = _named(raw, "columns", _COLUMNS, place), _named(raw, "tags", _TAGS, place)
    for media in ("images", "videos", "audios"):
        if columns[media]:
            raise UserError(f"{place}: holds {media} (column {columns[media]}), but this trains on text alone.")
    samples = raw.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise UserError(f"{place}: num_samples = {samples}: expected a whole number of 1 or more.")
    given = tuple(key for key in ("columns", "tags") if key in raw)
    entry = Entry(str(registry), name, formatting, bool(raw.get("ranking")), columns, tags, given, samples)
    return entry, {"path": _place(raw, registry, place), **{k: raw.get(k) for k in ("split", "subset", "folder")}}


def nearest_default(key: str, columns: Sequence[str]) -> str:
    """The file's column that is likely meant."""
    default = _COLUMNS[key] or key
    return default if default in columns else "its column"


def _last_trained(chat: Any) -> Any:
    from launcher.data.formats import Chat
    from launcher.data.formats.plain import untrained

    return Chat([*map(untrained, chat.messages[:-1]), chat.messages[-1]], chat.tools)


def _load(registry: Path) -> dict[str, Any]:
    try:
        entries = json.loads(registry.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{registry}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{registry}: not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{registry}: expected an object name -> entry, as LLaMA-Factory's dataset_info.json is.")
    return entries


def _named(raw: Mapping[str, Any], key: str, defaults: Mapping[str, str | None], place: str) -> dict[str, str | None]:
    """LLaMA-Factory's rule: the defaults hold only where the object is absent; else what it does not name is null."""
    given = raw.get(key)
    if given is None:
        return dict(defaults)
    if not isinstance(given, dict):
        raise UserError(f"{place}: {key} is no object of names.")
    for name in given:
        if name not in defaults:
            raise UserError(f"{place}: {key}.{name}: expected {', '.join(defaults)}. {nearest(name, defaults)}")
    return {name: given.get(name) for name in defaults}


def _place(raw: Mapping[str, Any], registry: Path, place: str) -> str:
    if raw.get("hf_hub_url"):
        return str(raw["hf_hub_url"])
    for key, what in (("ms_hub_url", "ModelScope"), ("om_hub_url", "OpenMind"), ("script_url", "a loading script")):
        if raw.get(key):
            raise UserError(
                f"{place}: {key} = {raw[key]}: {what} is not read here. Download the data and give file_name, or give "
                f"hf_hub_url."
            )
    if raw.get("cloud_file_name"):
        return str(raw["cloud_file_name"])
    if not raw.get("file_name"):
        raise UserError(f"{place}: says not where the data lie: give file_name or hf_hub_url.")
    return str(registry.parent / str(raw["file_name"]))
