"""Rows as a person or a program can look at them: tokens with their text, what is trained, where documents begin."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.mix import Mix
from launcher.data.prepare import Prepared
from launcher.data.store import Document, Side
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from launcher.data.lanes import Streamed
    from launcher.data.stream import Lanes

_LONGEST = 16  # tokens that are looked at together for one character; more are shown as what they are, broken
_TURNS = {*"\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}  # characters that reverse a line
_JOINERS = {"\u200c", "\u200d"}  # inside words and emoji they belong there


Begin = tuple[int, Mapping[int, Mapping[str, NDArray[Any]]] | None]  # steps that lanes have given, their states then


def preview(
    recipe: Recipe, prepared: Prepared, *, rows: int | None, step: int | None = None, begin: Begin = (0, None)
) -> dict[str, Any]:
    """The first rows that training will see, or those of one step's global batch.

    Args:
        rows: how many; None: all of the step
        step: from 1
        begin: from where a stream is read on to the step
    Returns:
        {"rows": [{"row": id, "source": name, "documents": [{"source", "record", "side", "tokens": [{"id", "text",
        "trained", "weight", "special"}]}]}], "stats": the train entry of data.json with seq_len}; `trained` says that
        the token counts in the loss; a character that several tokens make is the text of the first, and the others
        have none.
    """
    tokenizer = prepared.tokenizer
    words = load_tokenizer(TokenizerSpec(tokenizer["name"], tokenizer["revision"], recipe.model.trust_remote_code))
    if recipe.data.streaming:
        found = (
            _streamed(recipe, prepared, rows or 1) if step is None else _batch_of_lanes(recipe, prepared, step, begin)
        )
    else:
        found = _stored(recipe, prepared, rows, step)
    shown = [
        {"row": row, "source": source, "documents": _documents(documents, words, isolate=recipe.data.isolate)}
        for row, source, documents in islice(found, rows)
    ]
    return {"rows": shown, "stats": {**prepared.train, "seq_len": recipe.data.seq_len}}


def lines(shown: dict[str, Any], *, colour: bool) -> Iterator[str]:
    """The rows as text: trained tokens green, or between [[ and ]] without colour; a bar between tokens.

    A weight other than 1 follows its tokens, as `x0.5`; a pair's documents say which is chosen and which rejected.
    """
    for row in shown["rows"]:
        tokens = sum(len(document["tokens"]) for document in row["documents"])
        yield f"row {row['row']} of {row['source']}: {tokens} tokens, {len(row['documents'])} documents"
        for document in row["documents"]:
            yield f"--- {title(document)}"
            yield _marked(document["tokens"], colour=colour)
        yield ""


def title(document: dict[str, Any]) -> str:
    """What a document is, in a line: its file and record, its side, and how much of it is trained."""
    trained = sum(token["trained"] for token in document["tokens"])
    side = "" if document["side"] == "plain" else f", {document['side']}"
    counts = f"{len(document['tokens'])} tokens, {trained} trained"
    return f"{document['source']} record {document['record']}{side}: {counts}"


def pieces(tokens: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Tokens by the text they make together: mostly one, several where they share a character."""
    piece: list[dict[str, Any]] = []
    for token in tokens:
        if token["text"] and piece:
            yield piece
            piece = []
        piece.append(token)
    if piece:
        yield piece


def visible(text: str, *, newline: str = "\n") -> str:
    """Text without characters that a reader cannot see, or that change how the rest is shown."""
    return "".join(_visible(character, text, newline) for character in text)


def texts(ids: Sequence[int], words: Any) -> list[str]:
    """The text of each token, read after the one before it, as some tokenizers write a space only between words.

    A character that several tokens make is the text of the first of them; the others have an empty one.
    """
    found: list[str] = []
    begin, before = 0, ""  # the piece read last, and its text
    at = 0
    while at < len(ids):
        for end in range(at + 1, min(at + _LONGEST, len(ids)) + 1):
            text = _decode(words, ids[begin:end])[len(before) :]
            if text and not text.endswith("\ufffd"):
                break
        else:
            end = at + 1
            text = _decode(words, ids[begin:end])[len(before) :] or _decode(words, ids[at:end])
        found += [text, *[""] * (end - at - 1)]
        begin, at = at, end
        before = _decode(words, ids[begin:at])
    return found


_Row = tuple[int, str, list[Document]]  # its number, the name of its source, its documents


def _stored(recipe: Recipe, prepared: Prepared, rows: int | None, step: int | None) -> Iterator[_Row]:
    mix, seed = Mix.open(prepared.train), recipe.train.seed
    if step is None:
        found = mix.at(np.arange(min(rows or 1, mix.rows)), seed=seed)
    else:
        batch = recipe.train.global_batch_size
        found = mix.global_batch(step - 1, seed=seed, global_batch_size=batch, total_rows=prepared.total_rows)
    for row, source in zip(found.tolist(), mix.source_of(found).tolist(), strict=True):
        yield row, mix.names[source], list(mix.documents(row))


def _streamed(recipe: Recipe, prepared: Prepared, rows: int) -> Iterator[_Row]:
    """Rows of the first lane, which are the first rows of as many global batches."""
    from launcher.data.stream import Lanes

    lanes = Lanes(recipe, prepared.train, rank=0, ranks=prepared.train["lanes"])
    for row in range(rows):
        yield _streamed_row(lanes, row, lanes.rows()[0])


def _batch_of_lanes(recipe: Recipe, prepared: Prepared, step: int, begin: Begin) -> Iterator[_Row]:
    """The global batch of a step; what lies between the beginning and it is read and passed over."""
    from launcher.data.stream import Lanes

    at, states = begin
    lanes = Lanes(recipe, prepared.train, rank=0, ranks=1, states=states)
    for _ in range(step - 1 - at):
        lanes.rows()
    first = (step - 1) * prepared.train["lanes"]
    for lane, documents in zip(lanes.numbers, lanes.rows(), strict=True):
        yield _streamed_row(lanes, first + lane, documents)


def _streamed_row(lanes: Lanes, row: int, documents: tuple[Streamed, ...]) -> _Row:
    names = dict.fromkeys(lanes.names[d.source] for d in documents)
    return row, ", ".join(names), [Document(d.tokens, d.weights, lanes.source(d), d.at) for d in documents]


def _documents(documents: list[Document], words: Any, *, isolate: bool) -> list[dict[str, Any]]:
    special = {*words.all_special_ids, *words.added_tokens_decoder}
    return [_document(d, words, special, follows=i > 0 and not isolate) for i, d in enumerate(documents)]


def _document(document: Document, words: Any, special: set[int], *, follows: bool) -> dict[str, Any]:
    """A document whose first token is a target only if it follows another one that attention sees."""
    ids, weights = document.tokens.tolist(), document.weights.tolist()
    if not follows:
        weights[:1] = [0.0]
    tokens = [
        {"id": token, "text": text, "trained": weight > 0, "weight": weight, "special": token in special}
        for token, text, weight in zip(ids, texts(ids, words), weights, strict=True)
    ]
    side = Side(document.side).name
    return {"source": document.source, "record": document.record, "side": side, "tokens": tokens}


def _decode(words: Any, ids: Sequence[int]) -> str:
    text: str = words.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _visible(character: str, text: str, newline: str) -> str:
    if character == "\n":
        return newline
    if character == "\t":
        return "\t"
    category = unicodedata.category(character)
    hidden = category in ("Cf", "Cc", "Cs") and not (character in _JOINERS and len(text) > 1)
    return f"<U+{ord(character):04X}>" if hidden or character in _TURNS else character


def _marked(tokens: Sequence[dict[str, Any]], *, colour: bool) -> str:
    """Runs of tokens of one weight marked; a bar between tokens."""
    begin, end, bar = ("\x1b[32m", "\x1b[0m", "\x1b[2m|\x1b[22m") if colour else ("[[", "]]", "|")
    runs = []
    for weight, run in groupby(pieces(tokens), key=lambda piece: max(token["weight"] for token in piece)):
        text = bar.join(visible(piece[0]["text"]) for piece in run)
        factor = "" if weight in (0, 1) else f"x{weight:g}"
        runs.append(f"{begin}{text}{end}{factor}" if weight else text)
    return bar.join(runs)
