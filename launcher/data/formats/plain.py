"""Formats without a conversation: a prompt with its completion, plain text, and ids that somebody else tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.data.formats.chats import conversation
from launcher.data.formats.examples import Chat, Completion, Note, Skip, Text, Tokens
from launcher.data.formats.turns import read_tools
from launcher.data.formats.values import decoded, kind, listing, present, text
from launcher.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from launcher.data.formats.form import Format

IGNORED = -100  # the label of a token that is no target, as torch's cross-entropy and every peer have it
_LARGEST = (1 << 31) - 1


def read_completion(form: Format, record: Mapping[str, Any], note: Note) -> Completion | Chat:
    """Two texts, or a conversation where the prompt is a list of messages."""
    prompt = decoded(present(record, form.columns["prompt"]), f"column {form.columns['prompt']}", only="[")
    if isinstance(prompt, list):
        answer = decoded(present(record, form.columns["completion"]), f"column {form.columns['completion']}", only="[")
        turns = answer if isinstance(answer, list) else [answer]
        turns = [{"role": "assistant", "content": t} if isinstance(t, str) else t for t in turns]
        context = [untrained(m) for m in form.reader.read(prompt, note)]
        return conversation([*context, *form.reader.read(turns, note)], read_tools(record.get("tools"), "tools"))
    return Completion(text(record, form.columns["prompt"]), text(record, form.columns["completion"]))


def untrained(message: dict[str, Any]) -> dict[str, Any]:
    """A turn of the context, whose words are not what is learnt here."""
    return {**message, "train": False} if message["role"] == "assistant" else message


def read_text(form: Format, record: Mapping[str, Any], note: Note) -> Text:
    return Text(text(record, form.columns["text"]))


def read_tokens(form: Format, record: Mapping[str, Any], note: Note) -> Tokens:
    """Ids as they stand, without padding; a label of -100, or a mask of 0, is no target.

    Raises:
        UserError: something is no list of numbers, is of another length, or a label is not the id at its place.
    """
    import numpy as np

    column = form.columns["input_ids"]
    ids = _numbers(record, column)
    if ids.size == 0:
        raise Skip("empty")
    if ids.dtype.kind != "i":
        raise UserError(f"column {column}: token ids are whole numbers, but some here are not.")
    if int(ids.min()) < 0 or int(ids.max()) > _LARGEST:
        raise UserError(f"column {column}: token ids are whole numbers from 0, here from {ids.min()} to {ids.max()}.")
    weights = np.ones(len(ids), dtype=np.float32)
    if (labels := _beside(record, form.columns["labels"], column, ids)) is not None:
        trained = labels != IGNORED
        if not np.array_equal(labels[trained], ids[trained]):
            wrong = int(np.flatnonzero(trained & (labels != ids))[0])
            raise UserError(
                f"column {form.columns['labels']}: label {labels[wrong]} at place {wrong} is neither the token id "
                f"there ({ids[wrong]}) nor {IGNORED}. Labels stand at their own token, not one place before it."
            )
        weights *= trained
    if (mask := _beside(record, form.columns["loss_mask"], column, ids)) is not None:
        if not np.all(np.isfinite(mask)) or np.any(mask < 0):
            raise UserError(f"column {form.columns['loss_mask']}: weights are numbers of 0 or more.")
        weights *= mask.astype(np.float32)
    if (attended := _beside(record, form.columns["attention_mask"], column, ids)) is not None:
        ids, weights = ids[attended != 0], weights[attended != 0]
    return Tokens(ids.astype(np.uint32), weights)


def _beside(record: Mapping[str, Any], column: str, ids_column: str, ids: np.ndarray) -> np.ndarray | None:
    if record.get(column) is None:
        return None
    values = _numbers(record, column)
    if len(values) != len(ids):
        raise UserError(f"column {column} has {len(values)} entries, but {ids_column} has {len(ids)} tokens.")
    return values


def _numbers(record: Mapping[str, Any], column: str) -> np.ndarray:
    import numpy as np

    values = listing(record, column, "numbers")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        array = np.asarray(None)
    if len(values) and (array.ndim != 1 or array.dtype.kind not in "ifb"):
        odd = next((v for v in values if isinstance(v, bool) or not isinstance(v, int | float)), values[0])
        raise UserError(f"column {column} is no flat list of numbers: it holds {kind(odd)}.")
    return array.astype(np.int64) if array.dtype.kind == "b" or not len(values) else array
