"""Training data that are read while they are learnt: looked at once before any rank starts, then opened as lanes.

`look` finds mistakes early and fixes what must be the same for the whole run; `Lanes` are those of one rank.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.data.batches import MicroBatch, lay
from launcher.data.cache import cache_folder
from launcher.data.chat import MaskRule
from launcher.data.corpora import content_hash, encoding_of, tokenizer_of
from launcher.data.encode import REPAID_BYTES, TextEncoder, judge
from launcher.data.encoder import Encoder
from launcher.data.formats import Format, Labelled, Pair, Skip, choose
from launcher.data.lanes import COMPARED, WHOLE_FILE, Feed, Lane, LaneState, Rules, Streamed
from launcher.data.names import source_names
from launcher.data.parts import strings
from launcher.data.remote import Address, stamp
from launcher.data.seek import File, Found, Shelf, open_files
from launcher.data.sources import Listing, find
from launcher.data.store import Document
from launcher.data.tokenizer import load_tokenizer, missing_bytes
from launcher.errors import UserError
from launcher.recipe.schema import Recipe, Source

_BLOCKS = 8  # blocks of a source that each lane finds in an epoch, where there are enough
_BLOCK_BYTES, _BLOCK_ROWS = (64, 1 << 20), (1, 1024)  # least and most that belong to one lane together
_ROWS_REST_ON = ("seq_len", "packing", "isolate", "overlong", "shuffle_buffer")
_SAMPLED = 16  # files by which the size of a source is told
_LOOKED_AT = 32  # records of each source that are tried before ranks start


def look(recipe: Recipe, *, tokenizer: dict[str, Any], model_vocab_size: int | None) -> dict[str, Any]:
    """The entry `train` of data.json: each source is found, recognised and its first records are tokenised.

    Args:
        tokenizer: as `describe_tokenizer` gives it
        model_vocab_size: ids the model has; None where that is not known
    Raises:
        UserError: a source, its first records or the tokenizer do not fit the recipe; names file and record.
    """
    lanes, words = recipe.train.global_batch_size, load_tokenizer(tokenizer_of(recipe))
    missing = missing_bytes(words)
    said = f"the tokenizer has no token for {len(missing)} of 256 bytes and drops them from texts"
    lacking = [said] if missing else []
    limit = model_vocab_size or tokenizer["vocab_size"]
    entries: list[dict[str, Any]] = []
    shelf = _shelf(recipe)
    listings = [listed(source) for source in recipe.data.train]
    opened = [open_files(listing, shelf) for listing in listings]
    texts = partial(_texts, [file for files in opened for file in files])
    encoder = _encoder(recipe, words, texts, size=sum(_size(listing) for listing in listings))
    for name, source, listing, files in zip(
        source_names(recipe.data.train), recipe.data.train, listings, opened, strict=True
    ):
        form, file, first = _recognise(listing.source, files, recipe)
        encoder.check(form)
        largest = _try(file, form, first, encoder)
        if largest >= limit:
            raise UserError(
                f"{source.path}: holds token id {largest}, but the model has {limit} ids. Use the model's own "
                f"tokenizer, or a model with a larger vocab_size."
            )
        said = f"{form.said}; streamed"
        entries.append({
            "name": name, "path": source.path, "format": form.name, "files": len(files), "block": _block(files, lanes),
            "fingerprint": _fingerprint(listing), "formats": [f"{source.path}: {said}"],
            "warnings": [f"{source.path}: {warning}" for warning in (*form.warnings, *lacking)],
        })  # fmt: skip
    shares = _shares(recipe)
    return {
        "streaming": True, "rows": None, "epoch_rows": None, "lanes": lanes, "vocab_size": limit,
        "fingerprint": content_hash(
            encoding_of(recipe), [(entry["fingerprint"], entry["block"]) for entry in entries], shares, lanes,
            *(getattr(recipe.data, key) for key in _ROWS_REST_ON), recipe.data.mix.by, recipe.train.seed,
        ),
        "formats": [line for entry in entries for line in entry.pop("formats")],
        "warnings": [line for entry in entries for line in entry["warnings"]],
        "sources": [{**entry, "share": share} for entry, share in zip(entries, shares, strict=True)],
    }  # fmt: skip


class Lanes:
    """The lanes of one rank: lane r, r + ranks, r + 2 x ranks and so on.

    Args:
        entry: the entry `train` of data.json
        states: of the lanes of this rank, as `state` gave them; None: the beginning
    Raises:
        UserError: a source is no longer what it was when the run began.
    """

    def __init__(
        self, recipe: Recipe, entry: Mapping[str, Any], *, rank: int, ranks: int,
        states: Mapping[int, Mapping[str, NDArray[Any]]] | None = None,
    ) -> None:  # fmt: skip
        data, shelf = recipe.data, _shelf(recipe)
        self.names = [source["name"] for source in entry["sources"]]
        feeds = [
            _feed(source, known, shelf, recipe) for source, known in zip(data.train, entry["sources"], strict=True)
        ]
        rules = Rules(
            lanes=entry["lanes"], seed=recipe.train.seed, seq_len=data.seq_len, packing=data.packing,
            overlong=data.overlong, buffer=max(1, data.shuffle_buffer // entry["lanes"]),
            by="documents" if data.mix.by == "documents" else "tokens", vocab_size=entry["vocab_size"],
        )  # fmt: skip
        encoder = _encoder(recipe, load_tokenizer(tokenizer_of(recipe)), lambda: iter(()), size=0)
        self._feeds, self._rules, self._ranks, self._isolate = feeds, rules, ranks, data.isolate
        self._lanes = [
            Lane(lane, feeds, rules, encoder.encode, LaneState.from_arrays(states[lane]) if states else None)
            for lane in lanes_of(rank, ranks=ranks, lanes=entry["lanes"])
        ]

    @property
    def numbers(self) -> list[int]:
        """Which lanes these are."""
        return [lane.number for lane in self._lanes]

    def rows(self) -> list[tuple[Streamed, ...]]:
        """The next row of each lane."""
        return [lane.row() for lane in self._lanes]

    def lay(self, rows: Sequence[tuple[Streamed, ...]], *, step: int, micro_batch_size: int) -> list[MicroBatch]:
        """The rows of one step as this rank's micro-batches, in the order of the lanes; as many on every rank."""
        slots = -(-self._rules.lanes // (self._ranks * micro_batch_size)) * micro_batch_size
        numbers = [step * self._rules.lanes + lane for lane in self.numbers]
        filled: list[Any] = [*zip(numbers, rows, strict=True), *[None] * (slots - len(rows))]
        return [self._laid(filled[at : at + micro_batch_size]) for at in range(0, slots, micro_batch_size)]

    def _laid(self, slots: Sequence[tuple[int, tuple[Streamed, ...]] | None]) -> MicroBatch:
        pile = _Pile(self, self._isolate)
        return lay(pile, [(slot[0], pile.put(slot[1])) if slot else None for slot in slots], pad_to=None)

    def state(self) -> dict[int, LaneState]:
        """What the next rows follow from, by lane."""
        return {lane.number: lane.state() for lane in self._lanes}

    def source(self, document: Streamed) -> str:
        """The file that a document comes from."""
        return self._feeds[document.source].files[document.file].name


class _Pile:
    """Documents in memory, numbered as those of a store are; a number tells source, file, place and piece."""

    def __init__(self, lanes: Lanes, isolate: bool) -> None:
        self.isolate, self._lanes = isolate, lanes
        self._documents: dict[int, Streamed] = {}

    def put(self, row: Sequence[Streamed]) -> NDArray[np.int64]:
        for document in row:
            self._documents[_number(document)] = document
        return np.array([_number(document) for document in row], dtype=np.int64)

    def document(self, number: int) -> Document:
        found = self._documents[number]
        return Document(found.tokens, found.weights.astype(np.float32), self._lanes.source(found), found.at)


def _number(document: Streamed) -> int:
    where = (document.source, document.file, document.at, document.start)
    return int(xxhash.xxh3_64_intdigest(struct.pack("<4q", *where))) >> 1


@dataclass(frozen=True, slots=True)
class Told:
    """What became of the records so far, over some lanes."""

    dropped: dict[str, int]
    changed: dict[str, int]
    first: dict[str, str]


def told(states: Mapping[int, LaneState]) -> Told:
    """The counts of several lanes together."""
    total = Told({}, {}, {})
    for lane in sorted(states):
        state = states[lane]
        for counts, more in ((total.dropped, state.dropped), (total.changed, state.changed)):
            for reason, count in more.items():
                counts[reason] = counts.get(reason, 0) + count
        for reason, where in state.first.items():
            total.first.setdefault(reason, where)
    return total


def lanes_of(rank: int, *, ranks: int, lanes: int) -> range:
    """The lanes that a rank owns; with more ranks than lanes some own none."""
    return range(rank, lanes, ranks)


def listed(source: Source) -> Listing:
    """The files of a source; those of a hub dataset stay on the hub and are read from there.

    Raises:
        UserError: nothing lies there, or only some of the records are asked for.
    """
    listing = find(source)
    entry = getattr(listing.source, "entry", None)
    if listing.source.max_samples is not None or (entry is not None and entry.num_samples):
        raise UserError(
            f"{source.path}: max_samples, #N and num_samples count records, which data.streaming does not. Remove the "
            f"number, or set data.streaming=false."
        )
    return _on_hub(listing.source) if listing.kind == "hub" else listing


def _on_hub(source: Source) -> Listing:
    import datasets

    folder = {} if source.folder is None else {"data_dir": source.folder}
    try:
        builder = datasets.load_dataset_builder(source.path, name=source.subset, **folder)
        files = (builder.config.data_files or {}).get(source.split or "train")
    except Exception as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub gave no such dataset: {type(error).__name__}: {error}"
        ) from error
    if not files:
        raise UserError(f"{source.path}: no files of split '{source.split or 'train'}' lie on the hub.")
    return Listing(source, "files", tuple(Address(file) for file in files))


def _shelf(recipe: Recipe) -> Shelf:
    return Shelf(cache_folder(recipe) / "streamed")


def _encoder(recipe: Recipe, words: Any, texts: Callable[[], Iterator[str]], *, size: int) -> Encoder:
    """With the faster encoder where `prepare` has proven it; `size` 0 looks up what was found and proves nothing."""
    verdict = judge(words, texts, cache_folder(recipe) / "encoders", size=size)
    rule, texts_to_ids = MaskRule.of(recipe.data), TextEncoder(words, verdict)
    called = tokenizer_of(recipe).template_called
    return Encoder(words, rule=rule, objective=recipe.objective.kind, texts=texts_to_ids, template=called)


def _texts(files: Sequence[File]) -> Iterator[str]:
    for file in files:
        at, extent = 0, file.extent()
        while at < extent:
            found, at = file.read(at, extent)
            for _, record in found:
                yield from strings(record)


def _size(listing: Listing) -> int:
    """Bytes of a source, as far as this machine can tell; what lies elsewhere is large."""
    return sum(REPAID_BYTES if isinstance(file, str) else file.stat().st_size for file in listing.files)


def _feed(source: Source, known: Mapping[str, Any], shelf: Shelf, recipe: Recipe) -> Feed:
    listing = listed(source)
    files = open_files(listing, shelf)
    if len(files) != known["files"]:
        raise UserError(
            f"{source.path}: holds {len(files)} files, {known['files']} when the data were prepared. Bring the files "
            f"back, or start a new run."
        )
    form, _, _ = _recognise(listing.source, files, recipe)
    return Feed(known["name"], files, form, known["share"], known["block"])


def _recognise(source: Source, files: Sequence[File], recipe: Recipe) -> tuple[Format, File, Found]:
    """The format of a source, and its first records with the file they lie in."""
    for file in files:
        at, extent = 0, file.extent()
        while at < extent:
            found, at = file.read(at, extent)
            if found:
                first = found[0][1]
                return choose(source, list(first), first, recipe.data.placeholders), file, found[:_LOOKED_AT]
    raise UserError(f"{source.path}: holds no records. Fill it, or remove the source.")


def _try(file: File, form: Format, first: Found, encoder: Encoder) -> int:
    """Tokenise the first records; the largest id in them."""
    largest, pairs = 0, []
    for at, record in first:
        try:
            example = form.read(record)
        except Skip:
            continue
        except UserError as error:
            raise UserError(f"{file.place(at)}: {error}") from error
        if isinstance(example, (Pair, Labelled)):
            raise UserError(f"{file.place(at)}: {COMPARED}")
        pairs.append((file.place(at), example))
    for group in encoder.encode(pairs):
        largest = max([largest, *(int(ids.max()) for ids, _, _ in group.documents if ids.size)])
    return largest


def _block(files: Sequence[File], lanes: int) -> int:
    """How many places belong to one lane together: whole files where there are many."""
    if len(files) >= _BLOCKS * lanes:
        return WHOLE_FILE
    sample = files[:_SAMPLED]
    places = sum(file.extent() for file in sample) * len(files) // len(sample)
    least, most = _BLOCK_BYTES if sample[0].in_bytes else _BLOCK_ROWS
    return max(least, min(most, places // (_BLOCKS * lanes)))


def _fingerprint(listing: Listing) -> str:
    """Hash of the files' names and sizes, and how they are read: their content would take as long as to train on."""
    source = listing.source
    return content_hash(
        listing.kind, source.split, source.subset, source.format, source.columns, source.tags,
        [_identity(file) for file in listing.files],
    )  # fmt: skip


def _identity(file: Path | Address) -> str:
    """What tells a file from another version of it; a hub's address holds the revision."""
    if not isinstance(file, str):
        return f"{file.name} {file.stat().st_size}"
    return file if file.startswith("hf://") else f"{file.rpartition('/')[2]} {stamp(file)}"


def _shares(recipe: Recipe) -> list[float]:
    """Each source's share of the mix, from its weight and the temperature."""
    raised = [(source.weight or 1.0) ** (1 / recipe.data.mix.temperature) for source in recipe.data.train]
    return [share / sum(raised) for share in raised]
