"""Section `data`: which records are learnt, how they become rows, and which of their tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem, nearest

MISSING = "???"
ROLES = ("system", "developer", "user", "assistant")  # whose turns may be trained
MOST_PACKINGS = 64
SHUFFLE_BUFFER = 1000


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
    shuffle_buffer: int = SHUFFLE_BUFFER
    cache_dir: str | None = None
    num_workers: int | None = None


def check(data: Data) -> Iterator[Problem]:
    """Rules of this section alone."""
    yield from _sources(data)
    yield from _evaluation(data)
    yield from _mask(data)
    yield from _rows(data)
    yield from _stream(data)
    if data.num_workers is not None and data.num_workers < 1:
        yield Problem("data.num_workers", data.num_workers, "1 or more, or null for one a core")


def _sources(data: Data) -> Iterator[Problem]:
    if not data.train:
        yield Problem("data.train", "[]", "at least one source", "Add e.g. train: [{path: data.jsonl}].")
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if source.weight is not None and source.weight <= 0:
                yield Problem(f"data.{key}.{i}.weight", source.weight, "a number above 0", "Remove the source instead.")
            if source.max_samples is not None and source.max_samples < 1:
                yield Problem(f"data.{key}.{i}.max_samples", source.max_samples, "1 or more, or null for all")
            if source.name is not None and not (source.name.strip() and source.name.isprintable()):
                yield Problem(f"data.{key}.{i}.name", source.name, "a word, or null for the path's last part")
    yield from _shares(data)
    names = [source.name for source in data.train]
    for i, name in enumerate(names):
        if name is not None and name in names[:i]:
            fix = f"data.train.{names.index(name)} has it already."
            yield Problem(f"data.train.{i}.name", name, "a name that no other training source has", fix)


def _shares(data: Data) -> Iterator[Problem]:
    weights = [source.weight for source in data.train]
    if None in weights and any(weight is not None for weight in weights):
        i = weights.index(None)
        fix = "A weight is a share of the mix: give each source one, or none."
        yield Problem(f"data.train.{i}.weight", None, "a weight, because other sources have one", fix)
    for i, source in enumerate(data.eval):
        if source.weight is not None:
            expected = "null: every evaluation record counts once"
            yield Problem(f"data.eval.{i}.weight", source.weight, expected, "Remove the key.")
    if not 0 < data.mix.temperature < float("inf"):
        fix = "1 keeps the shares, 2 or more evens them out."
        yield Problem("data.mix.temperature", data.mix.temperature, "a number above 0", fix)


def _evaluation(data: Data) -> Iterator[Problem]:
    if not 0 <= data.eval_fraction <= 0.5:
        yield Problem("data.eval_fraction", data.eval_fraction, "a share from 0 to 0.5")
    if data.eval and data.eval_fraction:
        yield Problem(
            "data.eval_fraction", data.eval_fraction, "0 when data.eval names sources", "Keep one of the two."
        )


def _mask(data: Data) -> Iterator[Problem]:
    roles = data.train_roles
    for i, role in enumerate(roles):
        if role == "tool":
            fix = "Tool results come from outside, a model must not learn to write them."
            yield Problem(f"data.train_roles.{i}", role, ", ".join(ROLES), fix)
        elif role not in ROLES:
            yield Problem(f"data.train_roles.{i}", role, ", ".join(ROLES), nearest(role, ROLES))
        elif role in roles[:i]:
            yield Problem(f"data.train_roles.{i}", role, "each role once", "Remove it.")
    if not roles:
        yield Problem("data.train_roles", [], "at least one role", "Write [assistant].")
    if data.train_on == "all":
        for key, value, default in (
            ("train_roles", roles, ["assistant"]),
            ("train_end_of_turn", data.train_end_of_turn, True),
        ):
            if value != default:
                expected = "the default with train_on = all, which trains every token"
                yield Problem(f"data.{key}", value, expected, "Remove the key.", because=("data.train_on",))
    if data.train_on == "last_assistant" and roles != ["assistant"]:
        expected = "[assistant] with train_on = last_assistant"
        yield Problem("data.train_roles", roles, expected, "Write train_on: assistant.", because=("data.train_on",))
    for name in data.placeholders:
        if not name.isidentifier():
            expected = "names as they stand between {{ and }}, of letters, digits and _"
            yield Problem(f"data.placeholders.{name}", data.placeholders[name], expected)


def _rows(data: Data) -> Iterator[Problem]:
    if data.seq_len < 2:
        yield Problem("data.seq_len", data.seq_len, "2 tokens or more")
    if not data.isolate and data.packing != "concat":
        expected = f"true with packing = {data.packing}, whose documents have nothing to do with each other"
        fix = "Write packing: concat, or remove the key."
        yield Problem("data.isolate", False, expected, fix, because=("data.packing",))
    if data.packing == "concat" and data.overlong in ("drop", "truncate"):
        expected = "error or split with packing = concat, which cuts wherever a row ends and loses nothing"
        yield Problem("data.overlong", data.overlong, expected, "Remove the key.", because=("data.packing",))
    if not 1 <= data.repack <= MOST_PACKINGS:
        yield Problem("data.repack", data.repack, f"1 to {MOST_PACKINGS} packings")
    elif data.repack > 1 and data.packing != "best_fit":
        expected = f"1 with packing = {data.packing}, which there is only one of"
        yield Problem("data.repack", data.repack, expected, "Remove the key.", because=("data.packing",))


def _stream(data: Data) -> Iterator[Problem]:
    if data.shuffle_buffer < 1:
        yield Problem("data.shuffle_buffer", data.shuffle_buffer, "1 document or more; 1 does not shuffle")
    because = ("data.streaming",)
    if not data.streaming:
        if data.shuffle_buffer != SHUFFLE_BUFFER and data.shuffle_buffer >= 1:
            expected = f"{SHUFFLE_BUFFER}, the default, without data.streaming: prepared rows are permuted as a whole"
            yield Problem("data.shuffle_buffer", data.shuffle_buffer, expected, "Remove the key.", because=because)
        return
    if data.eval_fraction:
        fix = "Give data.eval."
        expected = "0 with data.streaming: nothing is held out of a source without an end"
        yield Problem("data.eval_fraction", data.eval_fraction, expected, fix, because=because)
    if data.repack > 1:
        expected = "1 with data.streaming, which packs as it reads"
        yield Problem("data.repack", data.repack, expected, "Remove the key.", because=because)
    if data.mix.until != "total":
        expected = "total with data.streaming, where epochs have no end"
        yield Problem("data.mix.until", data.mix.until, expected, "Remove the key.", because=because)
    if data.mix.by == "rows":
        expected = "tokens or documents with data.streaming, where rows hold several sources"
        yield Problem("data.mix.by", data.mix.by, expected, "Write tokens.", because=because)
    if len(data.train) > 1 and all(source.weight is None for source in data.train):
        expected = "a weight on each source with data.streaming, which does not know how large they are"
        yield Problem("data.train.0.weight", None, expected, "Write e.g. weight: 1.", because=because)
    for i, source in enumerate(data.train):
        if source.max_samples is not None:
            expected = "null with data.streaming, where nobody counts records"
            yield Problem(
                f"data.train.{i}.max_samples", source.max_samples, expected, "Remove the key.", because=because
            )
