"""What a recipe's data fall into: a store for each training source and each evaluation set, found or built once.

Two kinds of content-addressed folder in the cache: `tokens/<key>` holds the parts of one source under one tokenizer and
mask; `packed/<key>` is a store over such parts. A key hashes everything that decides the content, so a folder is never
stale, and each appears by one rename. Work runs under a file lock and never inside a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.cache import cache_folder
from launcher.data.chat import MaskRule
from launcher.data.lock import build_lock
from launcher.data.names import source_names
from launcher.data.parts import Progress, TokensJob, ensure_tokens
from launcher.data.rows import Held, build_rows
from launcher.data.sources import find, fingerprint, place
from launcher.data.space import space_watched
from launcher.data.store import VERSION, write_store
from launcher.data.tokenizer import TokenizerSpec, hash_tokenizer
from launcher.errors import UserError
from launcher.recipe.schema import Recipe, Source
from launcher.shipped import chat_template

CheckTokenizer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What goes into one store.

    role: train or eval
    name: of the source or of the evaluation set
    paths: of its sources, as the recipe has them
    key: names the store; fingerprint: hash of the content alone, the same wherever the files lie
    """

    role: str
    name: str
    jobs: tuple[TokensJob, ...]
    held: Held
    key: str
    fingerprint: str

    @property
    def paths(self) -> list[str]:
        return [job.listing.source.path for job in self.jobs]


def corpora(recipe: Recipe, *, check_tokenizer: CheckTokenizer) -> list[Corpus]:
    """Training sources in the order of the recipe, then evaluation sets; nothing is read but what is hashed.

    Args:
        check_tokenizer: see `TokensJob`.
    Raises:
        UserError: a source or the tokenizer is not there.
    """
    encoding = encoding_of(recipe)
    data = recipe.data
    streamed = data.streaming  # nothing of it is prepared
    train = [] if streamed else [_job(recipe, source, encoding, check_tokenizer) for source in data.train]
    names = [] if streamed else source_names(data.train)
    if data.eval_fraction:
        rest = [_corpus(recipe, "train", name, (job,), Held.rest) for name, job in zip(names, train, strict=True)]
        held = [_corpus(recipe, "eval", name, (job,), Held.held) for name, job in zip(names, train, strict=True)]
        return [*rest, *held]
    sets: dict[str, list[TokensJob]] = {}
    for name, source in zip(source_names(data.eval), data.eval, strict=True):
        sets.setdefault(name, []).append(_job(recipe, source, encoding, check_tokenizer))
    return [
        *(_corpus(recipe, "train", name, (job,), Held.all) for name, job in zip(names, train, strict=True)),
        *(_corpus(recipe, "eval", name, tuple(jobs), Held.all) for name, jobs in sets.items()),
    ]


def ensure_store(recipe: Recipe, corpus: Corpus, progress: Progress) -> tuple[Path, bool]:
    """Path of the corpus's store, and whether this call built it.

    Raises:
        UserError: the corpus cannot be learnt from, or the cache cannot be written.
    """
    cache = cache_folder(recipe)
    path = cache / "packed" / corpus.key
    if path.is_dir():
        return path, False
    make_writable(cache)
    lock = build_lock(cache / "locks" / corpus.key, waiting=lambda line: progress(line, 0, 0))
    with space_watched(cache), lock:
        if path.is_dir():
            return path, False
        folders = [ensure_tokens(job, cache, progress) for job in corpus.jobs]
        _pack(recipe, corpus, folders, path, progress)
    return path, True


def make_writable(cache: Path) -> None:
    """Make the folders of the cache.

    Raises:
        UserError: they cannot be written.
    """
    try:
        for name in ("packed", "tokens", "locks"):
            (cache / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {cache}: cannot be written: {error.strerror}. Set it, or LAUNCHER_CACHE."
        ) from error


def tokenizer_of(recipe: Recipe) -> TokenizerSpec:
    """The recipe's tokenizer and chat template.

    Raises:
        UserError: the recipe names no tokenizer, or a template that cannot be read.
    """
    model = recipe.model
    name = model.tokenizer or model.name
    if name is None:
        raise UserError(
            "model.tokenizer = null: expected a hub id or folder, because model.config brings no tokenizer."
        )
    template = None
    if recipe.data.chat_template is not None:
        try:
            template = chat_template(recipe.data.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template = {recipe.data.chat_template}: cannot be read: {error}") from error
    return TokenizerSpec(name, model.revision, model.trust_remote_code, template, recipe.data.chat_template)


def content_hash(*values: Any) -> str:
    """Of anything that JSON or `str` can tell, in 32 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def encoding_of(recipe: Recipe) -> str:
    """Hash of what makes ids and weights of a record."""
    data = recipe.data
    return content_hash(
        VERSION, hash_tokenizer(tokenizer_of(recipe)), recipe.objective.kind, data.train_on, data.train_roles,
        data.train_end_of_turn, data.placeholders,
    )  # fmt: skip


def _job(recipe: Recipe, source: Source, encoding: str, check_tokenizer: CheckTokenizer) -> TokensJob:
    listing = find(source)
    source = listing.source  # a registry's entry may say more than the recipe
    key = content_hash(
        encoding, fingerprint(listing, remembered=cache_folder(recipe) / "files"),
        source.format, source.columns, source.tags, source.max_samples,
        [file.suffix for file in listing.files],
    )  # fmt: skip
    return TokensJob(
        listing,
        key,
        tokenizer_of(recipe),
        rule=MaskRule.of(recipe.data),
        objective=recipe.objective.kind,
        num_workers=recipe.data.num_workers or len(os.sched_getaffinity(0)),
        check_tokenizer=check_tokenizer,
        placeholders=recipe.data.placeholders,
    )


def _corpus(recipe: Recipe, role: str, name: str, jobs: tuple[TokensJob, ...], held: Held) -> Corpus:
    data = recipe.data
    names = [name for job in jobs for name in job.listing.names]
    split = (held.name, data.eval_fraction, recipe.train.seed) if held != Held.all else ()
    content = content_hash(
        VERSION, [job.key for job in jobs], data.seq_len, data.packing, data.isolate, data.overlong, split,
        (data.repack, recipe.train.seed) if role == "train" and data.repack > 1 else 1,
        [Path(name).name for name in names] if split else [],
    )  # fmt: skip
    return Corpus(role, name, jobs, held, key=content_hash(content, names), fingerprint=content)


def _pack(recipe: Recipe, corpus: Corpus, folders: list[Path], path: Path, progress: Progress) -> None:
    progress(f"packing {corpus.name} rows", 0, 0)
    manifests = [json.loads((folder / "tokens.json").read_text()) for folder in folders]
    names = [job.listing.names for job in corpus.jobs]
    parts = [[folder / part for part in manifest["parts"]] for folder, manifest in zip(folders, manifests, strict=True)]
    times = recipe.data.repack if corpus.role == "train" else 1
    rows = build_rows(parts, names, held=corpus.held, recipe=recipe, repack=times)
    lost = {"dropped": dict(rows.dropped), "changed": dict(rows.changed)}
    first = dict(rows.first)
    for manifest, files in zip(manifests, names, strict=True):
        for what, counts in lost.items():
            for reason, count in manifest[what].items():
                counts[reason] = counts.get(reason, 0) + count
                file, record = manifest[f"first_{what}"][reason]
                first.setdefault(reason, place(files[file], record))
    if rows.empty:
        _refuse_nothing(recipe, corpus, lost["dropped"])
    largest, largest_files = max(zip(manifests, names, strict=True), key=lambda found: found[0]["largest_id"])
    write_store(
        path,
        parts=[part for source in parts for part in source],
        files=[name for source in names for name in source],
        index=rows.index,
        packings=rows.packings,
        isolate=recipe.data.isolate,
        seq_len=recipe.data.seq_len,
        meta={
            "key": corpus.key,
            "fingerprint": corpus.fingerprint,
            **lost,
            "first": first,
            "format": ", ".join(dict.fromkeys(m["format"] for m in manifests)),
            "formats": [f"{path}: {m['said']}" for path, m in zip(corpus.paths, manifests, strict=True)],
            "warnings": [
                f"{path}: {line}" for path, m in zip(corpus.paths, manifests, strict=True) for line in m["warnings"]
            ],
            "largest_id": largest["largest_id"],
            "largest_at": place(largest_files[largest["largest_at"][0]], largest["largest_at"][1]),
            "tokenizer": {**manifests[0]["tokenizer"], "name": tokenizer_of(recipe).name},
        },
    )  # fmt: skip


def _refuse_nothing(recipe: Recipe, corpus: Corpus, dropped: dict[str, int]) -> None:
    reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "no records"
    if corpus.held == Held.held:
        raise UserError(
            f"data.eval_fraction = {recipe.data.eval_fraction}: nothing of {corpus.paths[0]} is left to evaluate "
            f"({reasons}). Give a larger share, or data.eval."
        )
    raise UserError(f"data.{corpus.role}: {', '.join(corpus.paths)}: nothing is left to learn from ({reasons}).")
