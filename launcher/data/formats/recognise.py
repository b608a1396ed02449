"""Which format a source has: what the recipe says, or what the columns and values of its first record show.

Nothing is guessed: where several formats fit, or none, the candidates are listed, with what to write for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.data.formats.answers import is_transcript
from launcher.data.formats.form import Format
from launcher.errors import UserError, nearest
from launcher.recipe.schema.columns import COLUMNS, OTHER_NAME, TAGS, columns_of
from launcher.recipe.schema.data import Source

# our name of a column -> what files call it; the first is canonical and outranks the others
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "query": ("query", "prompt", "input", "instruction", "question", "problem"),
    "response": (
        "response", "answer", "output", "target", "targets", "answer_key", "answers", "solution", "text", "completion",
        "content",
    ),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "chosen": ("chosen", "chosen_messages", "chosen_response", "response_j"),
    "rejected": ("rejected", "rejected_messages", "rejected_response", "response_k"),
    "label": ("label", "kto_tag"),
    "text": ("text", "content"),
    "input_ids": ("input_ids",),
    "labels": ("labels",),
    "attention_mask": ("attention_mask",),
    "loss_mask": ("loss_mask", "completion_mask", "assistant_masks"),
}  # fmt: skip
_BESIDE = ("system", "history", "tools")
_AROUND = ("train", "records", "rows", "examples", "instances", "items")  # what wraps a list of records
_JUDGED = ("sharegpt", "messages", "alpaca", "prompt_completion", "query_response")


def choose(
    source: Source, columns: Sequence[str], first: Mapping[str, Any], placeholders: Mapping[str, str] | None = None
) -> Format:
    """The format of a source.

    Args:
        columns: of its first file that has records; those that a format may have need not be in the first of them.
        first: its first record.
        placeholders: what {{name}} in a text stands for.
    Raises:
        UserError: no format or several fit, or `columns` and `tags` name what the format has not.
    """
    if (entry := getattr(source, "entry", None)) is not None:
        form = entry.form(columns, first)
    else:
        look = _Look(source, columns, first)
        form = _recognised(look) if source.format == "auto" else _named(look, source.format)
    return replace(form, placeholders=dict(placeholders or {}))


@dataclass(slots=True)
class _Look:
    """What a source shows of itself.

    complaints: why formats that were looked for are not there
    """

    source: Source
    columns: Sequence[str]
    first: Mapping[str, Any]
    complaints: list[str] = field(default_factory=list)

    @property
    def mapping(self) -> dict[str, str]:
        given = self.source.columns or {}
        return {OTHER_NAME.get(ours, ours): theirs for ours, theirs in given.items()}

    @property
    def tags(self) -> dict[str, str]:
        return dict(self.source.tags or {})

    def pick(self, ours: str, *, exact: bool = False, later: bool = False) -> str | None:
        """The file's name of a column, None if the first record (`later`: any of the first ones) has none.

        Where several may be meant, a complaint and None.
        """
        if ours in self.mapping:
            return self.mapping[ours]
        names = ALIASES[ours][:1] if exact else ALIASES[ours]
        taken = set(self.mapping.values())
        there = self.columns if later else self.first
        found = [name for name in names if name in there and name not in taken]
        if len(found) > 1 and found[0] != ours:
            each = " or ".join(f"columns: {{{ours}: {name}}}" for name in found)
            complaint = f"{ours} may be {' or '.join(found)}: say {each}"
            if complaint not in self.complaints:
                self.complaints.append(complaint)
            return None
        return found[0] if found else None

    def value(self, column: str | None) -> Any:
        return self.first.get(column) if column else None

    def style(self, column: str | None) -> str:
        """openai, sharegpt or exchanges (a list of {human, assistant}) where a column holds messages; else empty."""
        value = self.value(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            import json

            try:
                value = json.loads(value)
            except ValueError:
                return ""
        value = value[0] if isinstance(value, list) and value else value
        keys = set(value) if isinstance(value, dict) else set()
        role = self.tags.get("role_tag")
        if role in keys:
            return "openai" if role == "role" else "sharegpt"
        if "role" in keys:
            return "openai"
        return "sharegpt" if "from" in keys else "exchanges" if keys >= {"human", "assistant"} else ""

    def beside(self, name: str) -> dict[str, str]:
        """The columns that a format may have: where the file has none, they may still come in a later record."""
        _, optional = COLUMNS[name]
        return {ours: self.pick(ours, later=True) or ours for ours in optional if ours in (*_BESIDE, "input")}


Found = dict[
    str, str
]  # our name -> the file's, for the columns that show the format; base and style under _base, _style


def _find_chat(look: _Look, name: str) -> Found | None:
    column = look.pick("messages")
    style = look.style(column)
    if column is None or style != {"messages": "openai", "sharegpt": "sharegpt"}[name]:
        return None
    return {"messages": column, "_style": style}


def _find_messages(look: _Look) -> Found | None:
    return _find_chat(look, "messages")


def _find_sharegpt(look: _Look) -> Found | None:
    return _find_chat(look, "sharegpt")


def _find_alpaca(look: _Look) -> Found | None:
    instruction, output = look.pick("instruction", exact=True), look.pick("output", exact=True)
    if instruction and not output and look.pick("input", exact=True) and "query" not in look.mapping:
        output = look.pick("response")  # instruction and input are one question, whatever the answer is called
    if not instruction or not output or isinstance(look.value(output), list):
        return None
    return {"instruction": instruction, "output": output}


def _find_completion(look: _Look) -> Found | None:
    prompt, completion = look.pick("prompt", exact=True), look.pick("completion", exact=True)
    return {"prompt": prompt, "completion": completion} if prompt and completion else None


def _find_query(look: _Look) -> Found | None:
    column = look.pick("messages")
    if look.style(column) == "exchanges":
        assert column is not None
        return {"conversations": column}
    if _find_alpaca(look) or _find_completion(look):
        return None
    query = look.pick("query")
    response = look.pick("response") if query else None
    if not query or not response or query == response or not isinstance(look.value(response), str | None):
        return None
    return {"query": query, "response": response}


def _find_preference(look: _Look) -> Found | None:
    chosen, rejected = look.pick("chosen"), look.pick("rejected")
    output = look.pick("output", exact=True)
    if not rejected and isinstance(look.value(output), list) and look.pick("instruction", exact=True):
        return {"instruction": "instruction", "answers": str(output), "_base": "alpaca"}
    if not rejected:
        return None
    if not chosen:
        return _find_full(look, rejected)
    answers = {"chosen": chosen, "rejected": rejected}
    value = look.value(chosen)
    opening = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    style = look.style(chosen) or "openai"
    role = opening.get("role", opening.get("from"))
    messages = look.pick("messages") if "messages" in look.mapping or not role_begins(role) else None
    if messages and look.style(messages) in ("openai", "sharegpt"):
        return {**answers, "messages": messages, "_style": look.style(messages), "_base": "messages"}
    if is_transcript(value) or role_begins(role):
        return {**answers, "_style": style, "_base": "messages"}
    if prompt := look.pick("prompt", exact=True):
        texts = isinstance(look.value(prompt), str) and isinstance(value, str)
        found = {**answers, "prompt": prompt, "_base": "prompt_completion" if texts else "messages"}
        return {**found, "_style": look.style(prompt) or style}
    if instruction := look.pick("instruction", exact=True):
        return {**answers, "instruction": instruction, "_style": style, "_base": "alpaca"}
    if query := look.pick("query"):
        return {**answers, "query": query, "_style": style, "_base": "query_response"}
    look.complaints.append(f"{chosen} and {rejected} follow no prompt: say columns: {{prompt: its column}}")
    return None


def _find_full(look: _Look, rejected: str) -> Found | None:
    """A whole record whose answer is the chosen one, with the rejected one beside it, as ms-swift has it."""
    for name in _JUDGED:
        if found := _FINDERS[name](look):
            if name in ("messages", "sharegpt"):
                return {**found, "rejected": rejected, "_base": "messages"}
            answer = next(ours for ours in ("output", "completion", "response") if ours in found)
            kept = {ours: theirs for ours, theirs in found.items() if ours != answer}
            return {**kept, "chosen": found[answer], "rejected": rejected, "_base": name}
    return None


def role_begins(role: Any) -> bool:
    """Whether a list of messages that begins with this role is a whole conversation, not an answer."""
    return role in ("system", "developer", "user", "human")


def _find_unpaired(look: _Look) -> Found | None:
    label = look.pick("label")
    value = look.value(label)
    named = "label" in look.mapping or look.source.format == "unpaired"
    if not label or not (isinstance(value, bool) or named):
        return None
    for name in _JUDGED:
        if found := _FINDERS[name](look):
            return {**found, "label": label, "_base": name}
    return None


def _find_text(look: _Look) -> Found | None:
    column = look.pick("text")
    return {"text": column} if column and isinstance(look.value(column), str | None) else None


def _find_tokens(look: _Look) -> Found | None:
    column = look.pick("input_ids")
    return {"input_ids": column} if column else None


_FINDERS: dict[str, Callable[[_Look], Found | None]] = {
    "messages": _find_messages,
    "sharegpt": _find_sharegpt,
    "alpaca": _find_alpaca,
    "prompt_completion": _find_completion,
    "query_response": _find_query,
    "preference": _find_preference,
    "unpaired": _find_unpaired,
    "text": _find_text,
    "tokens": _find_tokens,
}


def _recognised(look: _Look) -> Format:
    _check_names(look, None)
    found = {
        name: columns
        for name, finder in _FINDERS.items()
        if look.mapping.keys() <= {*COLUMNS[name][0], *COLUMNS[name][1]} and (columns := finder(look)) is not None
    }
    warnings = []
    if judged := [name for name in ("preference", "unpaired") if name in found]:
        found = {name: columns for name, columns in found.items() if name in (*judged, "text", "tokens")}
    if "text" in found and len(found) > 1 and (rest := _rendering(look, found)):
        warnings.append(f"column {found['text']['text']} is the same record as one text; format {rest} was taken")
        del found["text"]
    if len(found) != 1:
        raise _undecided(look, found)
    ((name, columns),) = found.items()
    if problem := _odd_label(look, name) or _left_context(look, name, columns):
        raise UserError(problem)
    return _made(look, name, columns, recognised=True, warnings=warnings)


def _rendering(look: _Look, found: Mapping[str, Found]) -> str:
    """The format whose texts a text column holds all of, as Stanford's alpaca has it; empty for none."""
    text = look.value(found["text"]["text"])
    for name in ("alpaca", "prompt_completion"):
        texts = [look.value(column) for ours, column in found.get(name, {}).items() if not ours.startswith("_")]
        if texts and isinstance(text, str) and all(isinstance(t, str) and t in text for t in texts):
            return name
    return ""


def _odd_label(look: _Look, name: str) -> str:
    """A label of numbers beside answers may be a judgement: nobody else knows."""
    value = look.value("label")
    if name not in _JUDGED or value is None or isinstance(value, bool):
        return ""
    return (
        f"{look.source.path}: column label is {value!r}: where it judges answers, make it true or false (format "
        f"unpaired); where it does not, set format: {name} to read the records without it."
    )


def _left_context(look: _Look, name: str, columns: Found) -> str:
    """A context beside a question and its answer may belong to the question: nobody else knows."""
    names = {"query_response": ("query", "response"), "prompt_completion": ("prompt", "completion")}.get(name, ("", ""))
    asks, answers = (columns.get(ours, "") for ours in names)
    if not asks or "context" in columns.values() or not isinstance(look.value("context"), str):
        return ""
    return (
        f"{look.source.path}: column context is not read by format {name}. Where it belongs to the question, set "
        f"format: alpaca, columns: {{instruction: {asks}, input: context, output: {answers}}}; "
        f"to leave it out, format: {name}."
    )


def _named(look: _Look, name: str) -> Format:
    """The format that the recipe names, with its columns; what a record has not, it says itself when it is read."""
    _check_names(look, name)
    found = _FINDERS[name](look)
    if found is None and name in ("preference", "unpaired", "query_response"):
        why = "; ".join(look.complaints) or f"expected {_expectation(name)}"
        raise UserError(
            f"{look.source.path}: the columns {', '.join(look.columns)} do not make format {name}: {why}. Name "
            f"them with columns: {{our name: the file's}}."
        )
    if found is None:
        found = {ours: look.pick(ours, exact=ours in ("output",)) or ours for ours in COLUMNS[name][0]}
        style = look.style(found.get("messages"))
        found["_style"] = style if style in ("openai", "sharegpt") else "sharegpt" if name == "sharegpt" else "openai"
    warnings = []
    if name not in ("preference", "unpaired"):
        judging = ("chosen", "rejected", "rejected_response", "kto_tag", "label")
        unread = [c for c in judging if c in look.columns and c not in found.values()]
        if unread:
            warnings.append(f"columns {', '.join(unread)}, which judge answers, are not read by format {name}")
    return _made(look, name, found, recognised=False, warnings=warnings)


def _made(look: _Look, name: str, found: Found, *, recognised: bool, warnings: list[str]) -> Format:
    columns = {ours: theirs for ours, theirs in found.items() if not ours.startswith("_")}
    if name == "tokens":
        columns |= {ours: look.pick(ours, later=True) or ours for ours in COLUMNS[name][1]}
    elif name != "text":
        columns = {**look.beside(found.get("_base", name) if name in ("preference", "unpaired") else name), **columns}
    not_read = tuple(column for column in look.columns if column not in columns.values())
    base, style = found.get("_base", ""), found.get("_style", "openai")
    return Format(name, columns, look.tags, recognised, warnings, base, style, not_read)


def _check_names(look: _Look, name: str | None) -> None:
    source = look.source
    for key in look.source.columns or {}:
        ours = OTHER_NAME.get(key, key)
        allowed = columns_of(name or "auto")
        if ours not in allowed:
            of = f"format {name} has no such column" if name else "no format has such a column"
            raise UserError(
                f"{source.path}: columns.{key}: {of}, expected {', '.join(allowed)}. {nearest(key, allowed)}"
            )
        if name is None and look.mapping[ours] not in look.columns:
            raise UserError(
                f"{source.path}: columns.{key} = {look.mapping[ours]}: the first record has no such column, it has "
                f"{', '.join(look.columns)}. {nearest(look.mapping[ours], look.columns)}"
            )
    for key in look.tags:
        if key not in TAGS:
            raise UserError(f"{source.path}: tags.{key}: expected {', '.join(TAGS)}. {nearest(key, TAGS)}")
    if look.tags and name in ("alpaca", "prompt_completion", "query_response", "text", "tokens"):
        raise UserError(f"{source.path}: tags are for formats of messages, not {name}. Remove them.")


def _undecided(look: _Look, found: Mapping[str, Found]) -> UserError:
    seen = f"{look.source.path}: columns {', '.join(look.columns) or '(none)'}"
    if found:
        return UserError(
            f"{seen} fit several formats: {', '.join(sorted(found))}. Set format to the one that is meant."
        )
    if look.complaints:
        return UserError(f"{seen}: {'; '.join(look.complaints)}.")
    if hint := _hint(look):
        return UserError(f"{seen} fit no format. {hint}")
    fits = "; ".join(f"{name}: {_expectation(name)}" for name in COLUMNS)
    return UserError(
        f"{seen} fit no format ({fits}). Set format, and columns: {{our name: the file's}} where names differ."
    )


def _expectation(name: str) -> str:
    return " + ".join(COLUMNS[name][0])


def _hint(look: _Look) -> str:
    """What to write for columns that look like a known format under names of their own."""
    lists = [
        c for c in look.columns if isinstance(v := look.value(c), list) and v and isinstance(v[0], dict) and len(v[0])
    ]
    if len(look.columns) == len(lists) == 1 and lists[0] in _AROUND:
        return f"If column {lists[0]} holds the records, make the file that list alone, or call the column data."
    for column in ALIASES["messages"]:
        if look.value(column) == []:
            return f"Column {column} of the first record is empty: leave the record out, or set format."
    for column in lists:
        if set(look.value(column)[0]) == {"label", "text"}:
            return (
                f"Column {column} holds texts with labels (Axolotl's input_output), which is no format here: write "
                f"them as messages with train: true or false, or tokenise them (format tokens)."
            )
        if look.style(column) in ("openai", "sharegpt"):
            return f"Column {column} holds messages: set columns: {{messages: {column}}}."
        if len(keys := list(look.value(column)[0])) >= 2:
            return (
                f"If column {column} holds messages, set format: sharegpt, columns: {{messages: {column}}} and tags: "
                f"{{role_tag: {keys[0]}, content_tag: {keys[1]}}}, with user_tag and assistant_tag where roles have "
                f"other names."
            )
    texts = [c for c in look.columns if isinstance(look.value(c), str)]
    if len(texts) == 1 and not any(isinstance(look.value(c), list) for c in look.columns):
        return f"If it is plain text, set format: text, columns: {{text: {texts[0]}}}."
    if len(texts) >= 2:
        return (
            f"If {texts[0]} asks and {texts[1]} answers, set format: query_response, columns: {{query: {texts[0]}, "
            f"response: {texts[1]}}}; without a chat template format: prompt_completion, columns: {{prompt: "
            f"{texts[0]}, completion: {texts[1]}}}."
        )
    return ""
