"""Section `data`: which records are learnt, how they become rows, and which of their tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class Source:
    """One source of records.

    path: file, folder, glob, s3:// or gs:// address, hub dataset id, or dataset_info.json#name; `path#500` takes 500
    name: what figures and messages call it; null: the path's last part
    format: how a record is read; auto recognises it from its columns and says what it saw
    split: split of a hub dataset
    subset: configuration name of a hub dataset
    folder: folder inside a hub dataset
    columns: our column name to the file's, as {prompt: question}
    tags: role and content tags of sharegpt records, as {role_tag: from, user_tag: human}
    weight: this source's share of the mix, against the others' (see data.mix); null on all: each as large as it is
    max_samples: use only the first so many records; null: all
    """

    path: str = MISSING
    name: str | None = None
    format: Literal[
        "auto", "messages", "alpaca", "sharegpt", "prompt_completion", "query_response", "preference", "unpaired",
        "text", "tokens",
    ] = "auto"  # fmt: skip
    split: str | None = None
    subset: str | None = None
    folder: str | None = None
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    weight: float | None = None
    max_samples: int | None = None


@dataclass(kw_only=True, slots=True)
class Mix:
    """How several sources share an epoch; without weights each is seen once.

    by: what a weight is a share of: tokens, rows or documents
    temperature: shares are raised to 1/temperature; above 1 evens them out
    until: an epoch holds as much as all sources together, or lasts until the first or the last of them is used up
    """

    by: Literal["tokens", "rows", "documents"] = "tokens"
    temperature: float = 1.0
    until: Literal["total", "first", "last"] = "total"


@dataclass(kw_only=True, slots=True)
class Data:
    """Which records are learnt, how they become rows, and which of their tokens are trained.

    train: sources of the training rows
    eval: sources of the evaluation rows, a loss for each name; empty: see eval_fraction
    eval_fraction: share of the training records held out for evaluation, 0 to 0.5; chosen by a hash of the record
    mix: how several sources share an epoch
    seq_len: longest row, in tokens
    packing: best_fit lays whole documents together into rows; concat lays them end to end and cuts; none: one a row
    isolate: whether attention, positions and targets stop at a document's border; false only for pretrain with concat
    repack: how many different packings of the documents there are; epoch k uses packing k modulo this
    chat_template: file with a Jinja chat template, or the name of a shipped one; null: the tokenizer's own
    train_on: which tokens of a conversation are trained: every assistant turn, the last one, or all tokens
    train_roles: roles whose turns are trained; tool results never are
    train_end_of_turn: whether the token that ends a trained turn is trained
    placeholders: what {{name}} in a text stands for, as {name: Ada}
    overlong: what happens to a document longer than seq_len
    streaming: read, tokenise and pack while training, without prepare; for sources without an end
    shuffle_buffer: documents among which a stream is shuffled
    cache_dir: folder of the tokenised stores; null: ~/.cache/launcher, or LAUNCHER_CACHE
    num_workers: processes that tokenise; null: one a core
    """

    train: list[Source] = field(default_factory=list)
    eval: list[Source] = field(default_factory=list)
    eval_fraction: float = 0.0
    mix: Mix = field(default_factory=Mix)
    seq_len: int = MISSING  # type: ignore[assignment]
    packing: Literal["best_fit", "concat", "none"] = "best_fit"
    isolate: bool = True
    repack: int = 1
    chat_template: str | None = None
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    train_end_of_turn: bool = True
    placeholders: dict[str, str] = field(default_factory=dict)
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    streaming: bool = False
    shuffle_buffer: int = 1000
    cache_dir: str | None = None
    num_workers: int | None = None


def check(data: Data) -> Iterator[Problem]:
    """Rules of this section alone."""
    if not data.train:
        yield Problem("data.train", "[]", "at least one source", "Add e.g. train: [{path: data.jsonl}].")
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if source.weight is not None and source.weight <= 0:
                yield Problem(f"data.{key}.{i}.weight", source.weight, "a number above 0", "Remove the source instead.")
            if source.max_samples is not None and source.max_samples < 1:
                yield Problem(f"data.{key}.{i}.max_samples", source.max_samples, "1 or more, or null for all")
    if not 0 <= data.eval_fraction <= 0.5:
        yield Problem("data.eval_fraction", data.eval_fraction, "a share from 0 to 0.5")
    if data.eval and data.eval_fraction:
        yield Problem(
            "data.eval_fraction", data.eval_fraction, "0 when data.eval names sources", "Keep one of the two."
        )
    if data.seq_len < 2:
        yield Problem("data.seq_len", data.seq_len, "2 tokens or more")
    if data.num_workers is not None and data.num_workers < 1:
        yield Problem("data.num_workers", data.num_workers, "1 or more, or null for one a core")
