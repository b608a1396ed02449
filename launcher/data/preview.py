"""Rows as a person or a program can look at them: tokens with their text, what is trained, where documents begin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from launcher.data.order import global_batch_rows
from launcher.data.prepare import Prepared
from launcher.data.store import Document, Store
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.recipe.schema import Recipe


def preview(recipe: Recipe, prepared: Prepared, *, rows: int) -> dict[str, Any]:
    """The first rows that training will see.

    Returns:
        {"rows": [{"row": id, "documents": [{"source", "record", "tokens": [{"id", "text", "trained", "weight"}]}]}],
        "stats": the train entry of data.json with seq_len}; `trained` says that the token counts in the loss.
    """
    store = Store.open(Path(prepared.train["store"]))
    tokenizer = prepared.tokenizer
    words = load_tokenizer(TokenizerSpec(tokenizer["name"], tokenizer["revision"], recipe.model.trust_remote_code))
    first = global_batch_rows(store.rows, seed=recipe.train.seed, step=0, global_batch_size=min(rows, store.rows))
    shown = [
        {"row": int(row), "documents": [_document(document, words) for document in store.documents(int(row))]}
        for row in first
    ]
    return {"rows": shown, "stats": {**prepared.train, "seq_len": recipe.data.seq_len}}


def lines(shown: dict[str, Any], *, colour: bool) -> Iterator[str]:
    """The rows as text: trained tokens green, or between [[ and ]] without colour; a bar between tokens."""
    for row in shown["rows"]:
        tokens = sum(len(document["tokens"]) for document in row["documents"])
        yield f"row {row['row']}: {tokens} tokens, {len(row['documents'])} documents"
        for document in row["documents"]:
            trained = sum(token["trained"] for token in document["tokens"])
            count = f"{len(document['tokens'])} tokens, {trained} trained"
            yield f"--- {document['source']} record {document['record']}: {count}"
            yield _marked(document["tokens"], colour=colour)
        yield ""


def _document(document: Document, words: Any) -> dict[str, Any]:
    tokens = []
    for place, (token, weight) in enumerate(zip(document.tokens.tolist(), document.weights.tolist(), strict=True)):
        counts = place > 0 and weight > 0  # nothing comes before the first token, so it is no target
        text = words.decode([token], clean_up_tokenization_spaces=False)
        tokens.append({"id": token, "text": text, "trained": counts, "weight": weight if counts else 0.0})
    return {"source": document.source, "record": document.record, "tokens": tokens}


def _marked(tokens: list[dict[str, Any]], *, colour: bool) -> str:
    """Runs of trained tokens marked; a bar between tokens."""
    begin, end, bar = ("\x1b[32m", "\x1b[0m", "\x1b[2m|\x1b[22m") if colour else ("[[", "]]", "|")
    runs = []
    for trained, run in groupby(tokens, key=lambda token: token["trained"]):
        text = bar.join(token["text"] for token in run)
        runs.append(f"{begin}{text}{end}" if trained else text)
    return bar.join(runs)
