"""How the records of one source are read, once it is known: the format's name, its columns, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from launcher.data.formats import answers, chats, plain
from launcher.data.formats.examples import Chat, Completion, Example, Labelled, Note, Pair
from launcher.data.formats.placeholders import fill
from launcher.data.formats.turns import Reader, oddities
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.data.dataset_info import Entry

MEDIA = frozenset({"images", "image", "videos", "video", "audios", "audio"})
# columns that change what is learnt of a record, so that none may be left out unseen
_MEANING = MEDIA | {
    "tools", "functions", "chosen", "rejected", "rejected_response", "rejected_messages", "chosen_messages", "kto_tag",
    "label",
}  # fmt: skip


_BEFORE = frozenset({"system", "system_prompt", "history"})  # what stands before a conversation


@dataclass(frozen=True, slots=True)
class Format:
    """How the records of one source are read.

    name: one of the schema's formats
    columns: our name -> the file's, for every column that is read
    tags: role_tag, content_tag and the roles' own names
    recognised: whether `auto` found the name
    warnings: what a person should know before they train on it
    base: for preference and unpaired, the format of what is judged
    style: how messages are written: openai {role, content} or sharegpt {from, value}
    not_read: columns of the first record that nothing reads
    placeholders: what {{name}} in a text stands for
    entry: the entry of a dataset_info.json whose rules hold
    """

    name: str
    columns: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    recognised: bool = False
    warnings: list[str] = field(default_factory=list)
    base: str = ""
    style: str = "openai"
    not_read: tuple[str, ...] = ()
    placeholders: Mapping[str, str] = field(default_factory=dict)
    entry: Entry | None = None

    def read(self, record: Mapping[str, Any], note: Note = lambda reason: None) -> Example:
        """One record as an example.

        Args:
            note: told the reason where something of the record is left out or changed.
        Raises:
            UserError: a column is missing, or is not what the format says; the caller adds file and record.
            Skip: the record is left out; its text is the reason, to be counted.
        """
        self._refuse_unread(record, note)
        odd: list[str] = []
        try:
            if self.entry is not None:
                example = self.entry.read(self, record, odd.append)
            else:
                example = _READERS[self.name](self, record, odd.append)
            judged = example.example if isinstance(example, Labelled) else example
            for chat in (judged.chosen, judged.rejected) if isinstance(judged, Pair) else (judged,):
                if isinstance(chat, Chat):
                    odd += oddities(chat.messages)
        finally:  # also of a record that is left out
            for reason in dict.fromkeys(odd):
                note(reason)
        return fill(example, self.placeholders, note)

    @property
    def conversational(self) -> bool:
        """Whether its records are conversations, as far as the columns tell, so that a chat template is needed."""
        name = self.base or self.name
        return name in ("messages", "sharegpt", "alpaca", "query_response")

    @property
    def said(self) -> str:
        """What `prepare` says of a source: the format, the columns that have other names, and what is not read."""
        renamed = ", ".join(f"{ours}: {theirs}" for ours, theirs in self.columns.items() if ours != theirs)
        words = f"{'recognised as' if self.recognised else 'read as'} {self.name}"
        words += f" of {self.base}" if self.base else ""
        words += f" ({renamed})" if renamed else ""
        return f"{words}; not read: {', '.join(self.not_read)}" if self.not_read else words

    @property
    def reader(self) -> Reader:
        """How its messages are read."""
        return _reader(self.style, tuple(sorted(self.tags.items())))

    def either_reader(self, turns: list[Any]) -> Reader:
        """How an answer's turns are read, which may be written in the other style than the prompt's."""
        ours, first = self.reader, turns[0] if turns and isinstance(turns[0], dict) else {}
        if ours.role in first or not {"role", "from"} & first.keys():
            return ours
        return Reader() if "role" in first else Reader("from", "value")

    def base_reader(self, record: Mapping[str, Any], note: Note) -> Chat | Completion:
        """What a label judges."""
        made = _READERS[self.base](self, record, note)
        assert isinstance(made, Chat | Completion)
        return made

    def _refuse_unread(self, record: Mapping[str, Any], note: Note) -> None:
        if self.conversational and self.entry is None:
            for column in _BEFORE & record.keys() - set(self.columns.values()):
                if record[column]:
                    note(f"column {column} is not read")
        if self.name in ("text", "tokens") and not self.recognised:
            return
        for column in _MEANING & record.keys() - set(self.columns.values()):
            value = record[column]
            if value in (None, "", "[]", "{}") or (isinstance(value, list | dict) and not value):
                continue
            if self.entry is not None:
                note(f"column {column} is not read: the entry's `columns` does not name it")
                continue
            if column in MEDIA:
                raise UserError(f"column {column} is not supported: this trains on text. Leave such records out.")
            if column in ("tools", "functions"):
                raise UserError(
                    f"column {column} is not read by format {self.name}, so the record would be learnt without it. "
                    f"Name it with columns: {{tools: {column}}} where the format has tools, or empty it."
                )
            if column == "label" and not isinstance(value, bool):
                continue
            if self.recognised:
                raise UserError(
                    f"column {column} judges answers, but the first record was recognised as {self.name}, which does "
                    f"not read it. Put such records into a source of their own, or set format: {self.name} to read all "
                    f"records without it."
                )


@cache
def _reader(style: str, tags: tuple[tuple[str, str], ...]) -> Reader:
    role, content = ("from", "value") if style == "sharegpt" else ("role", "content")
    return Reader.of(dict(tags), role=role, content=content)


_READERS: dict[str, Callable[[Format, Mapping[str, Any], Note], Example]] = {
    "messages": chats.read_chat,
    "sharegpt": chats.read_chat,
    "alpaca": chats.read_alpaca,
    "query_response": chats.read_query,
    "prompt_completion": plain.read_completion,
    "preference": answers.read_pair,
    "unpaired": answers.read_label,
    "text": plain.read_text,
    "tokens": plain.read_tokens,
}
