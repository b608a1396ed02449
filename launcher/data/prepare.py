"""From a recipe to what ranks open: prepares the stores of all sources, adds up what they hold, writes `data.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data import mix
from launcher.data.cache import cache_folder
from launcher.data.corpora import Corpus, content_hash, corpora, ensure_store, tokenizer_of
from launcher.data.duplicates import Duplicates, find_duplicates
from launcher.data.parts import Progress
from launcher.data.store import Store
from launcher.data.tokenizer import describe_tokenizer, load_tokenizer, locate
from launcher.errors import UserError
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory

_COUNTS = ("rows", "documents", "tokens", "trained_tokens", "trained_weight")
_REASONS = ("dropped", "changed", "groups")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare found or made.

    train, eval: their entries of data.json; eval is None without evaluation data
    leaked: evaluation records that are training records, too, by set
    steps_per_epoch: None where the data are streamed
    total_rows: rows of the whole run where epochs end it, else None
    total_steps: optimizer steps of the run
    built: whether this call had to build anything
    """

    train: dict[str, Any]
    eval: dict[str, Any] | None
    leaked: dict[str, int]
    global_batch_size: int
    steps_per_epoch: float | None
    total_rows: int | None
    total_steps: int
    vocab_size: int
    tokenizer: dict[str, Any]
    built: bool = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of data.json."""
        from launcher.run.data import VERSION

        return {
            "version": VERSION,
            "train": self.train,
            "eval": self.eval,
            "leaked": self.leaked,
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
        strict: a record that would be dropped, cut or repaired is an error.
    Raises:
        UserError: data, template or tokenizer cannot be learnt from as the recipe says; names file and record.
    """
    say = progress or _silent
    wanted = corpora_of(recipe)
    found = [ensure_store(recipe, corpus, say) for corpus in wanted]
    stores = [Store.open(path) for path, _ in found]
    for store in stores:
        _check_vocabulary(recipe, store.manifest)
    if strict and recipe.data.streaming:
        raise UserError(
            "strict: nobody knows what a stream will drop, cut or repair before it is read. Leave --strict out; each "
            "reason is told while the run trains. Or set data.streaming=false."
        )
    if strict:
        _refuse_losses([store.manifest for store in stores])
    train = [(c, s) for c, s in zip(wanted, stores, strict=True) if c.role == "train"]
    sets = [(c, s) for c, s in zip(wanted, stores, strict=True) if c.role == "eval"]
    duplicates = _duplicates(recipe, train, sets, say)
    evaluation = _evaluation(sets, recipe.data.seq_len) if sets else None
    built = any(built for _, built in found)
    if recipe.data.streaming:
        return _streaming(recipe, evaluation, [store for _, store in sets], built=built)
    entry = _train(recipe, train, duplicates)
    batch, rows = recipe.train.global_batch_size, entry["epoch_rows"]
    total_rows = None
    if recipe.train.max_steps is None:
        total_rows = max(1, round(rows * (recipe.train.epochs or 1)))
    return Prepared(
        train=entry,
        eval=evaluation,
        leaked=duplicates.leaked,
        global_batch_size=batch,
        steps_per_epoch=rows / batch,
        total_rows=total_rows,
        total_steps=recipe.train.max_steps or -(-(total_rows or 0) // batch),
        vocab_size=max(_needed_ids(store.manifest) for store in stores),
        tokenizer=stores[0].manifest["tokenizer"],
        built=built,
    )


def corpora_of(recipe: Recipe) -> list[Corpus]:
    """What the recipe's data fall into; a tokenizer that the model has not ids enough for is refused when it is loaded.

    Raises:
        UserError: a source or the tokenizer is not there.
    """
    return corpora(
        recipe, check_tokenizer=lambda tokenizer: _check_vocabulary(recipe, {"tokenizer": tokenizer, "largest_id": 0})
    )


def write_data_json(run: RunDirectory, prepared: Prepared, *, force: bool = False) -> None:
    """Write data.json into the run directory, whole. A run keeps the data it began with, at whatever path it lies.

    Raises:
        UserError: the run began with other data; not with `force`.
    """
    from launcher.run.data import require_current
    from launcher.run.files import write_atomic

    path = Path(run.data_file)
    if path.exists() and not force:
        before = json.loads(path.read_text())
        require_current(run, before)
        for role in ("train", "eval"):
            old, new = (before[role] or {}).get("fingerprint"), (getattr(prepared, role) or {}).get("fingerprint")
            if old != new:
                raise UserError(
                    f"{path}: the {role} data is no longer what the run began with (fingerprint {new}, expected "
                    f"{old}). Bring the files back, start a new run, or use --force."
                )
    write_atomic(path, json.dumps(prepared.to_dict(), indent=1) + "\n")


def _train(recipe: Recipe, train: Sequence[tuple[Corpus, Store]], duplicates: Duplicates) -> dict[str, Any]:
    """The entry `train` of data.json: each source, and how they share an epoch."""
    data = recipe.data
    entries = [_entry(corpus, store) for corpus, store in train]
    sizes = [mix.Size(entry["rows"], entry["tokens"], entry["documents"]) for entry in entries]
    shares = mix.shares(
        sizes, [source.weight for source in data.train], by=data.mix.by, temperature=data.mix.temperature
    )
    draws = mix.epoch_rows(sizes, shares, by=data.mix.by, until=data.mix.until)
    sources = [
        {
            "name": corpus.name,
            "path": corpus.paths[0],
            **{key: value for key, value in entry.items() if key != "formats"},
            "epoch_rows": drawn,
            "share": share,
            "format": store.manifest["format"],
        }
        for (corpus, store), entry, drawn, share in zip(train, entries, draws, shares, strict=True)
    ]
    return {
        **_sums(entries, data.seq_len),
        "epoch_rows": sum(draws),
        "fingerprint": content_hash([entry["fingerprint"] for entry in entries], draws),
        "duplicates": duplicates.within,
        "sources": sources,
    }


def _evaluation(sets: Sequence[tuple[Corpus, Store]], seq_len: int) -> dict[str, Any]:
    entries = [_entry(corpus, store) for corpus, store in sets]
    return {
        **_sums(entries, seq_len),
        "fingerprint": content_hash([(corpus.name, corpus.fingerprint) for corpus, _ in sets]),
        "sets": [{"name": corpus.name, **entry} for entry, (corpus, _) in zip(entries, sets, strict=True)],
    }


def _entry(corpus: Corpus, store: Store) -> dict[str, Any]:
    """What data.json says of one store."""
    keys = ("fingerprint", *_COUNTS, "packing_efficiency", *_REASONS, "formats", "warnings")
    return {"store": str(store.path), "key": corpus.key, **{key: store.manifest[key] for key in keys}}


def _sums(entries: Sequence[dict[str, Any]], seq_len: int) -> dict[str, Any]:
    """What several stores hold together, each counted once."""
    sums = {key: sum(entry[key] for entry in entries) for key in _COUNTS}
    return {
        **sums,
        "packing_efficiency": sums["tokens"] / (sums["rows"] * seq_len),
        **{key: _added(entry[key] for entry in entries) for key in _REASONS},
        **{key: [line for entry in entries for line in entry[key]] for key in ("formats", "warnings")},
    }


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _duplicates(
    recipe: Recipe, train: Sequence[tuple[Corpus, Store]], sets: Sequence[tuple[Corpus, Store]], progress: Progress
) -> Duplicates:
    if recipe.data.streaming:
        return Duplicates()
    key = content_hash([corpus.key for corpus, _ in train], [(corpus.name, corpus.key) for corpus, _ in sets])
    kept = cache_folder(recipe) / "duplicates" / f"{key}.json"
    if not kept.is_file():
        progress("looking for duplicates", 0, 0)
    return find_duplicates([store for _, store in train], {c.name: store for c, store in sets}, kept=kept)


def _streaming(
    recipe: Recipe, evaluation: dict[str, Any] | None, stores: Sequence[Store], *, built: bool
) -> Prepared:  # fmt: skip
    """Training data that are read while they are learnt: what is known of them is what their first records show."""
    from launcher.data.stream import look

    spec = tokenizer_of(recipe)
    tokenizer = {**describe_tokenizer(spec, load_tokenizer(spec)), "name": spec.name}
    known = {"tokenizer": tokenizer, "largest_id": 0}
    _check_vocabulary(recipe, known)
    return Prepared(
        train=look(recipe, tokenizer=tokenizer, model_vocab_size=_model_vocab_size(recipe)),
        eval=evaluation,
        leaked={},
        global_batch_size=recipe.train.global_batch_size,
        steps_per_epoch=None,
        total_rows=None,
        total_steps=recipe.train.max_steps or 0,
        vocab_size=max(_needed_ids(manifest) for manifest in (known, *(store.manifest for store in stores))),
        tokenizer=tokenizer,
        built=built,
    )


def _check_vocabulary(recipe: Recipe, manifest: dict[str, Any]) -> None:
    size, needed = _model_vocab_size(recipe), _needed_ids(manifest)
    if size is not None and needed > size:
        where = f" ({manifest['largest_at']})" if needed == manifest["largest_id"] + 1 else ""
        raise UserError(
            f"model.tokenizer = {manifest['tokenizer']['name']}: the data needs token ids up to {needed - 1}{where}, "
            f"but the model's vocab_size is {size}. Use the model's own tokenizer, or a model.config with vocab_size "
            f"of at least {needed}."
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


def _refuse_losses(manifests: Sequence[dict[str, Any]]) -> None:
    lines = [
        f"  {reason}: {count}, the first is {manifest['first'][reason]}"
        for manifest in manifests
        for reason, count in {**manifest["dropped"], **manifest["changed"]}.items()
    ]
    if lines:
        raise UserError("\n".join(["strict: records would be dropped, cut or repaired", *lines]))


def _silent(_what: str, _done: int, _total: int) -> None:
    return None
