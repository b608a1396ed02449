"""Formats that judge answers: pairs of a chosen and a rejected one, and single answers with a label.

What is learnt of either is the answer alone: the assistant's turns before it are marked as not trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from launcher.data.formats.chats import Turns, alpaca_context, chat_turns, conversation, query_context, said, tools_of
from launcher.data.formats.examples import Chat, Completion, Labelled, Note, Pair, Skip
from launcher.data.formats.plain import untrained
from launcher.data.formats.turns import is_empty
from launcher.data.formats.values import decoded, kind, listing, present, text, truth
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.data.formats.form import Format

_TURN = re.compile(r"\n\nHuman:|\n\nAssistant:")


def is_transcript(value: Any) -> bool:
    """Whether a text is a whole conversation as Anthropic's hh-rlhf writes it."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def read_pair(form: Format, record: Mapping[str, Any], note: Note) -> Pair:
    """The two answers of a record behind the turns that both follow.

    Raises:
        Skip: the answers are the same, or one is empty.
        UserError: an answer is missing, or the turns before the two differ.
    """
    chosen, rejected = _two(form, record)
    if "prompt" in form.columns and all(isinstance(x, str) for x in (chosen, rejected)):
        prompt = record.get(form.columns["prompt"])
        if isinstance(prompt, str) and not prompt.lstrip().startswith("[{"):
            return _checked(Completion(prompt, chosen), Completion(prompt, rejected))
    before, tools = _context(form, record, note), tools_of(form, record)
    if "chosen" not in form.columns and "answers" not in form.columns:  # the conversation itself ends with the chosen
        cut = max((i + 1 for i, m in enumerate(before) if m["role"] in ("user", "tool")), default=0)
        if isinstance(rejected, list):
            cut = max((i + 1 for i, m in enumerate(before) if m["role"] == "user"), default=0)
        before, good = before[:cut], before[cut:]
    else:
        good = _answer(form, chosen, "chosen", note)
    return _joined(before, good, _answer(form, rejected, "rejected", note), tools)


def read_label(form: Format, record: Mapping[str, Any], note: Note) -> Labelled:
    """An answer with its label."""
    column = form.columns["label"]
    good = truth(present(record, column), f"column {column}")
    example = form.base_reader(record, note)
    if isinstance(example, Chat):
        if example.messages[-1]["role"] != "assistant":
            raise UserError("the label judges the last turn, but that is not the assistant's.")
        example = Chat([*map(untrained, example.messages[:-1]), example.messages[-1]], example.tools)
    elif not example.completion:
        raise Skip("the answer is empty")
    return Labelled(example, good)


def checked_pair(before: Turns, chosen: Turns | str, rejected: Turns | str, tools: list[dict[str, Any]] | None) -> Pair:
    """Two answers to the same turns; see `read_pair`."""
    both = [[said("assistant", answer)] if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return _joined(before, both[0], both[1], tools)


def _two(form: Format, record: Mapping[str, Any]) -> tuple[Any, Any]:
    columns = form.columns
    if "answers" in columns:
        answers = listing(record, columns["answers"], "two answers")
        if len(answers) != 2 or not all(isinstance(a, str) for a in answers):
            raise UserError(f"column {columns['answers']}: expected two texts [chosen, rejected].")
        return answers[0], answers[1]
    chosen = _value(record, columns["chosen"]) if "chosen" in columns else None
    rejected = _value(record, columns["rejected"])
    if is_transcript(chosen) and is_transcript(rejected):
        return _transcript(str(chosen)), _transcript(str(rejected))
    return chosen, rejected


def _value(record: Mapping[str, Any], column: str) -> Any:
    value = present(record, column)
    return (
        decoded(value, f"column {column}") if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"') else value
    )


def _transcript(words: str) -> list[dict[str, str]]:
    """The turns of `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    words = f"\n\n{words.lstrip()}"
    ends = [*(m.start() for m in _TURN.finditer(words)), len(words)]
    turns = []
    for begin, end in pairwise(ends):
        role, _, content = words[begin:end].strip().partition(":")
        turns.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
    return turns


def _context(form: Format, record: Mapping[str, Any], note: Note) -> Turns:
    columns = form.columns
    if "messages" in columns:
        return chat_turns(form, record, note)
    if "prompt" in columns:
        prompt = _value(record, columns["prompt"])
        if isinstance(prompt, list):
            return form.reader.read(prompt, note)
        return [said("user", text(record, columns["prompt"]))]
    if "instruction" in columns:
        return alpaca_context(form, record)
    return query_context(form, record) if "query" in columns else []


def _answer(form: Format, value: Any, which: str, note: Note) -> Turns:
    if isinstance(value, str):
        return [said("assistant", value)]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise UserError(f"column {form.columns.get(which, which)} is {kind(value)}, expected an answer: text or turns.")
    try:
        return form.either_reader(turns).read(turns, note)
    except UserError as error:
        raise UserError(f"{which}: {error}") from error


def _joined(before: Turns, good: Turns, bad: Turns, tools: list[dict[str, Any]] | None) -> Pair:
    """Both conversations, split where they part."""
    if not good or not bad:
        raise Skip("an answer is empty")
    if good == bad:
        raise Skip("chosen and rejected are the same")
    for which, answer in (("chosen", good), ("rejected", bad)):
        if before and answer[0]["role"] != "assistant" and not _repeats(before, answer):
            raise UserError(f"{which} begins with a {answer[0]['role']} turn, which is not how the prompt begins.")
    wholes = [answer if before and answer[0]["role"] != "assistant" else [*before, *answer] for answer in (good, bad)]
    shared = next(
        (i for i, (a, b) in enumerate(zip(*wholes, strict=False)) if a != b), min(len(whole) for whole in wholes)
    )
    shared = max(shared, len(before))
    for which, whole in zip(("chosen", "rejected"), wholes, strict=True):
        if len(whole) == shared:
            raise UserError(f"{which} ends where the other one goes on: both need an answer to the same turns.")
        if whole[shared]["role"] != "assistant":
            raise UserError(
                f"{which}: chosen and rejected part at turn {shared + 1}, which is not the assistant's but a "
                f"{whole[shared]['role']} turn. Both must answer the same turns."
            )
    if shared == 0:
        raise UserError("chosen and rejected follow no prompt. Name its column, as columns: {prompt: question}.")
    if wholes[0][shared - 1]["role"] == "assistant":
        raise UserError(
            f"turn {shared} is the assistant's, and chosen and rejected follow it. Leave that answer out of the prompt."
        )
    context = [untrained(message) for message in wholes[0][:shared]]
    if any(is_empty(message) for whole in wholes for message in whole[shared:]):
        raise Skip("an answer is empty")
    chats = [conversation([*context, *whole[shared:]], tools) for whole in wholes]
    return Pair(chats[0], chats[1])


def _repeats(before: Turns, answer: Turns) -> bool:
    return answer[: len(before)] == before


def _checked(chosen: Completion, rejected: Completion) -> Pair:
    if chosen == rejected:
        raise Skip("chosen and rejected are the same")
    if not chosen.completion or not rejected.completion:
        raise Skip("an answer is empty")
    return Pair(chosen, rejected)
