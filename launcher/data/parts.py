"""How one source becomes parts: cut into shards, tokenised by processes, gathered in one content-addressed folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launcher.data.chat import MaskRule
from launcher.data.encode import REPAID_BYTES, judge
from launcher.data.formats import choose
from launcher.data.lock import build_lock
from launcher.data.sources import Listing, load, records
from launcher.data.store import VERSION, sync_folder
from launcher.data.tokenize import Shard, ShardContext, tokenise_shard
from launcher.data.tokenizer import (
    TokenizerSpec,
    describe_tokenizer,
    is_bare,
    missing_bytes,
    replaces_template,
    unknown_marks,
)
from launcher.data.workers import map_unordered
from launcher.errors import UserError

Progress = Callable[[str, int, int], None]  # (what is going on, done, total); total 0: not countable

SHARD_BYTES = 4 << 20  # a shard of about so many bytes of records ...
MOST_SHARDS = 4096  # ... or as many as keep their number below this
_REPAID_SHARDS = 8  # by tiktoken in one process, which takes more than a second to start
_SAMPLE_RECORDS, _SAMPLE_BLOCKS = 100, 200


@dataclass(frozen=True, slots=True)
class TokensJob:
    """One source under one tokenizer and mask.

    key: hash of all that decides the tokens
    check_tokenizer: called with the tokenizer's description before any record is tokenised; may refuse it
    """

    listing: Listing
    key: str
    spec: TokenizerSpec
    rule: MaskRule
    objective: str
    num_workers: int
    check_tokenizer: Callable[[dict[str, Any]], None]
    placeholders: Mapping[str, str] = field(default_factory=dict)


def ensure_tokens(job: TokensJob, cache: Path, progress: Progress) -> Path:
    """Folder of one source's parts and `tokens.json`; keeps the shards that are finished, whoever made them.

    Raises:
        UserError: the source cannot be read or learnt from; names file and record.
    """
    path = cache / "tokens" / job.key
    if path.is_dir():
        return path
    with build_lock(cache / "locks" / job.key, waiting=lambda line: progress(line, 0, 0)) as beat:
        if path.is_dir():
            return path
        unfinished = _unfinished(path)
        opened = _open(job, unfinished, cache, progress)
        _tokenise(job, opened, opened.shards, progress, beat)
        for leftover in unfinished.iterdir():
            if leftover not in [shard.path for shard in opened.shards]:
                shutil.rmtree(leftover)
        (unfinished / "tokens.json").write_text(json.dumps(_manifest(opened), indent=1))
        with open(unfinished / "tokens.json") as f:
            os.fsync(f.fileno())
        sync_folder(unfinished)
        os.rename(unfinished, path)
        sync_folder(path.parent)
    return path


def tokenise_share(job: TokensJob, cache: Path, progress: Progress, *, number: int, of: int) -> None:
    """Make the shards whose number modulo `of` is `number`; others do theirs at the same time, on any machine.

    Raises:
        UserError: as `ensure_tokens`.
    """
    path = cache / "tokens" / job.key
    if path.is_dir():
        return
    unfinished = _unfinished(path)
    opened = _open(job, unfinished, cache, progress)
    _tokenise(job, opened, opened.shards[number::of], progress, lambda _done, _total: None)
    if path.is_dir():  # somebody has gathered all parts meanwhile, so what lies here came too late
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source that is ready to be tokenised.

    shards: all of it, the same wherever and by however many they are made
    described: what the manifest says of format, tokenizer and encoder
    """

    context: ShardContext
    shards: list[Shard]
    described: dict[str, Any]


def _unfinished(path: Path) -> Path:
    folder = path.with_name(f".{path.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open(job: TokensJob, folder: Path, cache: Path, progress: Progress) -> _Opened:
    source, name = job.listing.source, Path(job.listing.source.path).name
    progress(f"reading {name}", 0, 0)
    with build_lock(cache / "locks" / f"{job.key}.arrow", waiting=lambda line: progress(line, 0, 0)):
        tables = _first(load(job.listing, folder / "arrow"), source.max_samples)
    full = [i for i, table in enumerate(tables) if len(table)]
    if not full:
        raise UserError(f"{source.path}: holds no records. Fill it, or remove the source.")
    first = records(tables[full[0]], 0, 1, job.listing.names[full[0]])[0]
    form = choose(source, tables[full[0]].column_names, first, job.placeholders)
    context = ShardContext(job.spec, form, tables, job.listing.names, rule=job.rule, objective=job.objective)
    tokenizer = describe_tokenizer(job.spec, context.tokenizer())
    job.check_tokenizer(tokenizer)
    context.check()
    size = sum(table.data.nbytes for table in tables)
    texts = partial(_sample_texts, tables, job.listing.names)
    if size >= REPAID_BYTES:
        progress("choosing an encoder", 0, 0)
    context.verdict = judge(context.tokenizer(), texts, cache / "encoders", size=size)
    if context.verdict is not None:
        progress(str(context.verdict), 0, 0)
    warnings = list(form.warnings)
    if size >= REPAID_BYTES and context.verdict is not None and not context.verdict.proven:
        warnings.append(str(context.verdict))
    if missing := missing_bytes(context.tokenizer()):
        warnings.append(f"the tokenizer has no token for {len(missing)} of 256 bytes and drops them from texts")
    if form.conversational and (marks := unknown_marks(context.tokenizer())):
        warnings.append(
            f"the chat template holds {', '.join(marks)}, which the tokenizer has not as special tokens: what it "
            f"writes of them is learnt as plain text"
        )
    said = form.said
    if not form.conversational and form.name != "tokens" and is_bare(job.spec):
        said += f"; documents end with {context.tokenizer().eos_token}, as tokenizer.json names no end token"
    if replaces_template(job.spec):
        said += "; data.chat_template replaces the tokenizer's own"
    return _Opened(
        context,
        _shards(tables, folder),
        {"said": said, "format": form.name, "warnings": warnings, "tokenizer": tokenizer},
    )


def _sample_texts(tables: list[Any], names: list[str]) -> Iterator[str]:
    """Every string of the records, some hundred at a time, in an order that soon has seen all parts of all tables."""
    blocks = [(i, begin) for i, table in enumerate(tables) for begin in range(0, len(table), _SAMPLE_RECORDS)]
    step = max(1, len(blocks) // _SAMPLE_BLOCKS)
    for first in range(step):
        for i, begin in blocks[first::step]:
            end = min(begin + _SAMPLE_RECORDS, len(tables[i]))
            yield from strings(records(tables[i], begin, end, names[i]))


def strings(value: Any) -> Iterator[str]:
    """Every string inside of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def _tokenise(
    job: TokensJob, opened: _Opened, shards: list[Shard], progress: Progress, beat: Callable[[int, int], None]
) -> None:
    """Make those of some shards that are not there."""
    what, total = f"tokenising {Path(job.listing.source.path).name}", len(shards)
    left = [shard for shard in shards if not shard.path.is_dir()]
    done = total - len(left)
    progress(what, done, total)
    for _ in _run(opened.context, left, job.num_workers):
        done += 1
        beat(done, total)
        progress(what, done, total)


def _manifest(opened: _Opened) -> dict[str, Any]:
    return {
        "version": VERSION,
        "parts": [shard.path.name for shard in opened.shards],
        **opened.described,
        **_summed(json.loads((shard.path / "part.json").read_text()) for shard in opened.shards),
    }


def _run(context: ShardContext, shards: list[Shard], num_workers: int) -> Iterable[Any]:
    """Shards as they are made: by processes, or here where so few of them would not repay a process's start."""
    fast = context.verdict is not None and context.verdict.proven
    num_workers = min(num_workers, max(1, len(shards) // (_REPAID_SHARDS if fast else 1)))
    if num_workers == 1:
        return (tokenise_shard(context, shard) for shard in shards)
    return map_unordered(tokenise_shard, context, shards, num_workers=num_workers)


def _first(tables: list[Any], max_samples: int | None) -> list[Any]:
    """The first `max_samples` records over all tables, in order of files."""
    if max_samples is None:
        return tables
    kept = []
    for table in tables:
        take = min(len(table), max_samples)
        max_samples -= take
        kept.append(table.select(range(take)) if take else table.select([]))
    return kept


def _shards(tables: list[Any], folder: Path) -> list[Shard]:
    """Row ranges of about equal bytes; the same for any number of workers, so that finished ones can be kept."""
    size = max(SHARD_BYTES, sum(table.data.nbytes for table in tables) // MOST_SHARDS)
    shards: list[Shard] = []
    for file, table in enumerate(tables):
        rows = len(table)
        count = min(rows, -(-table.data.nbytes // size))
        for i in range(count):
            path = folder / f"part-{len(shards):05d}"
            shards.append(Shard(path, file, rows * i // count, rows * (i + 1) // count))
    return shards


def _summed(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all shards; of what was dropped or changed also the first record, as [file, record]."""
    documents, largest, largest_at = 0, -1, [0, 0]
    lost: dict[str, dict[str, Any]] = {"dropped": {}, "first_dropped": {}, "changed": {}, "first_changed": {}}
    for part in parts:
        documents += part["documents"]
        if part["largest_id"] > largest:
            largest, largest_at = part["largest_id"], part["largest_at"]
        for what in ("dropped", "changed"):
            for reason, count in part.get(what, {}).items():
                lost[what][reason] = lost[what].get(reason, 0) + count
                lost[f"first_{what}"].setdefault(reason, part[f"first_{what}"][reason])
    return {"documents": documents, "largest_id": largest, "largest_at": largest_at, **lost}
