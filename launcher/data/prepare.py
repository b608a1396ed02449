"""From a recipe to the stores that ranks open: finds what is already made, builds the rest once, writes `data.json`.

Two kinds of content-addressed folder in the cache: `tokens/<key>` holds the parts of one source under one tokenizer and
mask; `packed/<key>` is a store over such parts. A key hashes everything that decides the content, so a folder is never
stale, and each appears by one rename. Work runs under a file lock and never inside a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.lock import build_lock
from launcher.data.parts import Progress, TokensJob, ensure_tokens
from launcher.data.rows import Held, build_rows
from launcher.data.sources import find, fingerprint, place
from launcher.data.space import space_watched
from launcher.data.store import VERSION, Store, write_store
from launcher.data.tokenizer import TokenizerSpec, hash_tokenizer, locate
from launcher.errors import UserError
from launcher.recipe.schema import Recipe, Source

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare found or made.

    train, eval: each store's entry of data.json; eval is None without evaluation data
    total_rows: rows of the whole run where epochs end it, else None
    total_steps: optimizer steps of the run
    built: whether this call had to build anything
    """

    train: dict[str, Any]
    eval: dict[str, Any] | None
    global_batch_size: int
    steps_per_epoch: float
    total_rows: int | None
    total_steps: int
    vocab_size: int
    tokenizer: dict[str, Any]
    built: bool = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of data.json."""
        return {
            "version": 1,
            "train": self.train,
            "eval": self.eval,
            "global_batch_size": self.global_batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "total_rows": self.total_rows,
            "total_steps": self.total_steps,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
        }


def prepare(recipe: Recipe, *, progress: Progress | None = None, strict: bool = False) -> Prepared:
    """Make sure that the recipe's stores exist, and say what they hold.

    Args:
        progress: told what goes on; called often.
        strict: a record that would be dropped or cut is an error.
    Raises:
        UserError: data, template or tokenizer cannot be learnt from as the recipe says; names file and record.
    """
    corpora = _corpora(recipe)
    found = {c.role: _ensure_store(recipe, c, progress or _silent) for c in corpora}
    stores = {role: Store.open(path) for role, (path, _) in found.items()}
    for store in stores.values():
        _check_vocabulary(recipe, store.manifest)
        if strict:
            _refuse_losses(store.manifest)
    train, batch = stores["train"], recipe.train.global_batch_size
    total_rows = None
    if recipe.train.max_steps is None:
        total_rows = max(1, round(train.rows * (recipe.train.epochs or 1)))
    return Prepared(
        train=_entry(train),
        eval=_entry(stores["eval"]) if "eval" in stores else None,
        global_batch_size=batch,
        steps_per_epoch=train.rows / batch,
        total_rows=total_rows,
        total_steps=recipe.train.max_steps or -(-(total_rows or 0) // batch),
        vocab_size=max(_needed_ids(store.manifest) for store in stores.values()),
        tokenizer=train.manifest["tokenizer"],
        built=any(built for _, built in found.values()),
    )


def write_data_json(run: RunDirectory, prepared: Prepared, *, force: bool = False) -> None:
    """Write data.json into the run directory, whole. A run keeps the data it began with, at whatever path it lies.

    Raises:
        UserError: the run began with other data; not with `force`.
    """
    from launcher.run.files import write_atomic

    path = Path(run.data_file)
    if path.exists() and not force:
        before = json.loads(path.read_text())
        for role in ("train", "eval"):
            old, new = (before[role] or {}).get("fingerprint"), (getattr(prepared, role) or {}).get("fingerprint")
            if old != new:
                raise UserError(
                    f"{path}: the {role} data is no longer what the run began with (fingerprint {new}, expected "
                    f"{old}). Bring the files back, start a new run, or use --force."
                )
    write_atomic(path, json.dumps(prepared.to_dict(), indent=1) + "\n")


def cache_folder(recipe: Recipe) -> Path:
    """Where stores lie: data.cache_dir, else LAUNCHER_CACHE, else ~/.cache/launcher."""
    return (
        Path(recipe.data.cache_dir or os.environ.get("LAUNCHER_CACHE") or "~/.cache/launcher").expanduser().absolute()
    )


@dataclass(frozen=True, slots=True)
class _Corpus:
    """What goes into one store: train or eval."""

    role: str
    jobs: tuple[TokensJob, ...]
    held: Held
    key: str
    fingerprint: str


def _corpora(recipe: Recipe) -> list[_Corpus]:
    spec = _tokenizer(recipe)
    encoding = _hash(VERSION, hash_tokenizer(spec), recipe.objective.kind, recipe.data.train_on)
    train = tuple(_job(recipe, source, encoding) for source in recipe.data.train)
    if recipe.data.eval_fraction:
        return [_corpus(recipe, "train", train, Held.rest), _corpus(recipe, "eval", train, Held.held)]
    evaluation = tuple(_job(recipe, source, encoding) for source in recipe.data.eval)
    corpora = [_corpus(recipe, "train", train, Held.all)]
    return [*corpora, _corpus(recipe, "eval", evaluation, Held.all)] if evaluation else corpora


def _job(recipe: Recipe, source: Source, encoding: str) -> TokensJob:
    listing = find(source)
    key = _hash(
        encoding, fingerprint(listing), source.format, source.columns, source.tags, source.max_samples,
        [file.suffix for file in listing.files],
    )  # fmt: skip
    return TokensJob(
        listing,
        key,
        _tokenizer(recipe),
        train_on=recipe.data.train_on,
        objective=recipe.objective.kind,
        num_workers=recipe.data.num_workers or len(os.sched_getaffinity(0)),
        check_tokenizer=lambda tokenizer: _check_vocabulary(recipe, {"tokenizer": tokenizer, "largest_id": 0}),
    )


def _corpus(recipe: Recipe, role: str, jobs: tuple[TokensJob, ...], held: Held) -> _Corpus:
    data = recipe.data
    names = [name for job in jobs for name in job.listing.names]
    weights = [job.listing.source.weight for job in jobs]
    split = (held.name, data.eval_fraction, recipe.train.seed) if held != Held.all else ()
    chosen_by_name = split or any(weight % 1 for weight in weights)
    content = _hash(
        VERSION, [job.key for job in jobs], weights, data.seq_len, data.packing, data.overlong, split,
        [Path(name).name for name in names] if chosen_by_name else [],
    )  # fmt: skip
    return _Corpus(role, jobs, held, key=_hash(content, names), fingerprint=content)


def _ensure_store(recipe: Recipe, corpus: _Corpus, progress: Progress) -> tuple[Path, bool]:
    """Path of the corpus's store, and whether this call built it."""
    cache = cache_folder(recipe)
    path = cache / "packed" / corpus.key
    if path.is_dir():
        return path, False
    _make_writable(cache)
    lock = build_lock(cache / "locks" / corpus.key, waiting=lambda line: progress(line, 0, 0))
    with space_watched(cache), lock:
        if path.is_dir():
            return path, False
        folders = [ensure_tokens(job, cache, progress) for job in corpus.jobs]
        _pack(recipe, corpus, folders, path, progress)
    return path, True


def _pack(recipe: Recipe, corpus: _Corpus, folders: list[Path], path: Path, progress: Progress) -> None:
    progress(f"packing {corpus.role} rows", 0, 0)
    manifests = [json.loads((folder / "tokens.json").read_text()) for folder in folders]
    names = [job.listing.names for job in corpus.jobs]
    parts = [[folder / part for part in manifest["parts"]] for folder, manifest in zip(folders, manifests, strict=True)]
    rows = build_rows(
        parts, names, [job.listing.source.weight for job in corpus.jobs], held=corpus.held, recipe=recipe
    )  # fmt: skip
    dropped, first = dict(rows.dropped), dict(rows.first)
    for manifest, files in zip(manifests, names, strict=True):
        for reason, count in manifest["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
            file, record = manifest["first_dropped"][reason]
            first.setdefault(reason, place(files[file], record))
    if rows.row_offsets.size < 2:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "no records"
        raise UserError(f"data.{corpus.role}: nothing is left to learn from ({reasons}).")
    write_store(
        path,
        parts=[part for source in parts for part in source],
        files=[name for source in names for name in source],
        index=rows.index,
        packings=[(rows.row_offsets, rows.row_documents)],
        seq_len=recipe.data.seq_len,
        meta={
            "key": corpus.key,
            "fingerprint": corpus.fingerprint,
            "dropped": dropped,
            "changed": rows.changed,
            "first": first,
            "formats": [f"{j.listing.source.path}: {m['said']}" for j, m in zip(corpus.jobs, manifests, strict=True)],
            "largest_id": max(m["largest_id"] for m in manifests),
            "tokenizer": {**manifests[0]["tokenizer"], "name": _tokenizer(recipe).name},
        },
    )


def _tokenizer(recipe: Recipe) -> TokenizerSpec:
    model = recipe.model
    name = model.tokenizer or model.name
    if name is None:
        raise UserError(
            "model.tokenizer = null: expected a hub id or folder, because model.config brings no tokenizer."
        )
    template = None
    if recipe.data.chat_template is not None:
        try:
            template = Path(recipe.data.chat_template).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template = {recipe.data.chat_template}: cannot be read: {error}") from error
    return TokenizerSpec(name, model.revision, model.trust_remote_code, template)


def _check_vocabulary(recipe: Recipe, manifest: dict[str, Any]) -> None:
    size, needed = _model_vocab_size(recipe), _needed_ids(manifest)
    if size is not None and needed > size:
        raise UserError(
            f"model.tokenizer = {manifest['tokenizer']['name']}: the data needs token ids up to {needed - 1}, but the "
            f"model's vocab_size is {size}. Use the model's own tokenizer, or a model.config with vocab_size of at "
            f"least {needed}."
        )


def _needed_ids(manifest: dict[str, Any]) -> int:
    """Ids a model must have: every token of plain text, and those special tokens that the data holds."""
    return max(manifest["tokenizer"]["text_vocab_size"], manifest["largest_id"] + 1)


def _model_vocab_size(recipe: Recipe) -> int | None:
    """From the recipe or the model's config.json, else the default of its family; None for code of its own."""
    config = recipe.model.config
    if config is None:
        file = locate(recipe.model.name or "", recipe.model.revision) / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return _default_vocab_size(config) if size is None else int(size)


def _default_vocab_size(config: dict[str, Any]) -> int | None:
    """The size that a model has whose configuration names none, as the trainer will build it."""
    if "model_type" not in config:
        return None
    from transformers import AutoConfig

    try:
        whole = AutoConfig.for_model(**config)
    except ValueError:  # not an architecture of transformers: the model's own code, or the trainer, has to say
        return None
    return getattr(whole.get_text_config(), "vocab_size", None)


def _refuse_losses(manifest: dict[str, Any]) -> None:
    lost = {**manifest["dropped"], **manifest["changed"]}
    if lost:
        lines = [f"  {reason}: {count}, the first is {manifest['first'][reason]}" for reason, count in lost.items()]
        raise UserError("\n".join(["strict: records would be dropped or cut", *lines]))


def _entry(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    keys = (
        "key", "rows", "documents", "tokens", "trained_tokens", "trained_weight", "packing_efficiency", "fingerprint",
        "dropped", "changed", "formats",
    )  # fmt: skip
    return {"store": str(store.path), **{key: manifest[key] for key in keys}}


def _make_writable(cache: Path) -> None:
    try:
        for name in ("packed", "tokens", "locks"):
            (cache / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {cache}: cannot be written: {error.strerror}. Set it, or LAUNCHER_CACHE."
        ) from error


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _silent(_what: str, _done: int, _total: int) -> None:
    return None
