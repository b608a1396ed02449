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

    path: file, folder, glob or hub dataset id; files are json, jsonl, parquet, csv, tsv or txt
    format: how a record is read; auto recognises it from its columns and says what it saw
    split: split of a hub dataset
    subset: configuration name of a hub dataset
    columns: our column name to the file's, as {prompt: question}
    tags: role and content tags of sharegpt records, as {role_tag: from, user_tag: human}
    weight: how often each record is seen in one epoch; 0.5 takes a fixed half, 2 sees each twice
    max_samples: use only the first so many records; null: all
    """

    path: str = MISSING
    format: Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text"] = "auto"
    split: str | None = None
    subset: str | None = None
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    weight: float = 1.0
    max_samples: int | None = None


@dataclass(kw_only=True, slots=True)
class Data:
    """Which records are learnt, how they become rows, and which of their tokens are trained.

    train: sources of the training rows
    eval: sources of the evaluation rows; empty: see eval_fraction
    eval_fraction: share of the training records held out for evaluation, 0 to 0.5
    seq_len: longest row, in tokens
    packing: best_fit lays whole documents together into rows kept apart by attention; none lays one document a row
    chat_template: file with a Jinja chat template; null: the tokenizer's own
    train_on: which tokens of a conversation are trained: every assistant turn, the last one, or all tokens
    overlong: what happens to a document longer than seq_len
    cache_dir: folder of the tokenised stores; null: ~/.cache/launcher, or LAUNCHER_CACHE
    num_workers: processes that tokenise; null: one a core
    """

    train: list[Source] = field(default_factory=list)
    eval: list[Source] = field(default_factory=list)
    eval_fraction: float = 0.0
    seq_len: int = MISSING  # type: ignore[assignment]
    packing: Literal["best_fit", "none"] = "best_fit"
    chat_template: str | None = None
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    cache_dir: str | None = None
    num_workers: int | None = None


def check(data: Data) -> Iterator[Problem]:
    """Rules of this section alone."""
    if not data.train:
        yield Problem("data.train", "[]", "at least one source", "Add e.g. train: [{path: data.jsonl}].")
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if source.weight <= 0:
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
