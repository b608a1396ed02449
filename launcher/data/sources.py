"""Where records come from: files, folders, globs, saved datasets and hub ids; all read through the `datasets` library.

Finding and hashing local files needs no heavy import, so that a store already made is found at once.
"""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher.data.space import full_disk
from launcher.errors import UserError, nearest
from launcher.recipe.schema.data import Source

# ending -> packaged builder of `datasets`
_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".txt": "text",
}  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 22
_SAMPLE_RECORDS, _SAMPLE_BLOCKS = 100, 200


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source's path stands for.

    source: the recipe's source
    kind: files, saved (a folder of `Dataset.save_to_disk`) or hub
    files: the files in order of name; empty for hub
    """

    source: Source
    kind: str
    files: tuple[Path, ...]

    @property
    def names(self) -> list[str]:
        """What documents say they come from: one name for each table of `load`."""
        return [str(f) for f in self.files] if self.kind == "files" else [self.source.path]


def find(source: Source) -> Listing:
    """Say which files a source names, without reading them.

    Raises:
        UserError: nothing lies there, or nothing that can be read.
    """
    path = Path(source.path).expanduser()
    if any(c in source.path for c in "*?["):
        matches = tuple(sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()))
        return _listing(source, matches, f"{source.path}: the pattern matches no file.")
    if path.is_dir():
        saved = {"state.json", "dataset_dict.json"} & {p.name for p in path.iterdir()}
        files = tuple(sorted(p for p in path.rglob("*") if p.is_file()))
        if saved:
            return Listing(source, "saved", files)
        known = tuple(f for f in files if f.suffix in _BUILDERS and not f.name.startswith("."))
        return _listing(source, known, f"{source.path}: the folder holds no {_endings()} file.")
    if path.is_file():
        return _listing(source, (path,), "")
    if path.suffix in _BUILDERS or path.is_absolute() or not _HUB_ID.fullmatch(source.path):
        raise UserError(f"{source.path}: no such file or folder.{_similar(path)}")
    return Listing(source, "hub", ())


def fingerprint(listing: Listing) -> str:
    """Hash of everything the records are read from; each file is read once, in pieces."""
    digest = xxhash.xxh3_128()
    source = listing.source
    digest.update(repr((listing.kind, source.split, source.subset)).encode())
    if listing.kind == "hub":
        digest.update(load(listing, Path())[0]._fingerprint.encode())
    for file in listing.files:
        digest.update(repr((file.suffix, file.stat().st_size)).encode())
        with open(file, "rb") as f:
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def load(listing: Listing, scratch: Path) -> list[Any]:
    """The records as memory-mapped `datasets.Dataset` tables, one for each of `listing.names`, row for row as in files.

    Args:
        scratch: folder for the Arrow copies that `datasets` makes of files.
    Raises:
        UserError: a file cannot be read as what its ending says; names the file and, where known, the line.
    """
    import datasets

    datasets.disable_progress_bars()
    source = listing.source
    if listing.kind == "hub":
        return [_load_hub(source)]
    if listing.kind == "saved":
        table = datasets.load_from_disk(str(Path(source.path).expanduser()))
        if isinstance(table, datasets.DatasetDict):
            split = source.split or "train"
            if split not in table:
                raise UserError(f"{source.path}: no split '{split}', it has {', '.join(table)}.")
            table = table[split]
        return [table]
    return [_load_file(file, scratch) for file in listing.files]


def records(table: Any, begin: int, end: int, name: str) -> list[dict[str, Any]]:
    """Rows begin:end of a table of `load`.

    Raises:
        UserError: a row holds bytes that are not UTF-8, which shows only when it is read; names file and record.
    """
    try:
        columns = table[begin:end]
    except UnicodeDecodeError as error:
        if end - begin > 1:
            middle = (begin + end) // 2
            return records(table, begin, middle, name) + records(table, middle, end, name)
        raise UserError(f"{place(name, begin)}: not UTF-8: {error}") from error
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def sample_texts(tables: list[Any], names: list[str]) -> Iterator[str]:
    """Every string of the records, some hundred at a time, in an order that soon has seen all parts of all tables."""
    blocks = [(i, begin) for i, table in enumerate(tables) for begin in range(0, len(table), _SAMPLE_RECORDS)]
    step = max(1, len(blocks) // _SAMPLE_BLOCKS)
    for first in range(step):
        for i, begin in blocks[first::step]:
            end = min(begin + _SAMPLE_RECORDS, len(tables[i]))
            yield from _strings(records(tables[i], begin, end, names[i]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def place(name: str, record: int) -> str:
    """How messages name a record: its index from 0, and its row as people count."""
    return f"{name}: record {record} (row {record + 1})"


def _listing(source: Source, files: tuple[Path, ...], none: str) -> Listing:
    if not files:
        raise UserError(none)
    for key in ("split", "subset"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.path}: {key} = {getattr(source, key)}, but files have none. Remove the key.")
    for file in files:
        if file.suffix not in _BUILDERS:
            raise UserError(f"{file}: cannot read '{file.suffix}' files, expected {_endings()}.")
    return Listing(source, "files", files)


def _endings() -> str:
    return ", ".join(_BUILDERS)


def _similar(path: Path) -> str:
    folder = path.parent
    hint = nearest(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
    return f" {hint}" if hint else ""


def _load_hub(source: Source) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.path, name=source.subset, split=source.split or "train")
    except Exception as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub gave no such dataset: {type(error).__name__}: {error}"
        ) from error


def _load_file(file: Path, scratch: Path) -> Any:
    import datasets

    kind = _BUILDERS[file.suffix]
    options: dict[str, Any] = {}
    if kind == "json":
        options = _json_options(file)
        if options.pop("empty", False):
            return datasets.Dataset.from_dict({})
    elif file.stat().st_size == 0:
        return datasets.Dataset.from_dict({})
    if kind == "csv":
        options = _csv_options(file)
    try:
        with _unlogged(datasets.utils.logging):
            table = datasets.load_dataset(
                kind, data_files=[str(file)], split="train", cache_dir=str(scratch), **options
            )  # fmt: skip
    except Exception as error:
        if full := full_disk(error):
            raise full from error
        cause = error.__cause__ or error
        raise UserError(_broken(file, kind) or f"{file}: cannot be read as {kind}: {cause}") from error
    if kind == "json" and _has_dates(table.features):  # text that looks like a date was made one: read it as it stands
        return datasets.Dataset.from_list([record for _, record in _json_records(file)])
    return table


@contextmanager
def _unlogged(log: Any) -> Iterator[None]:
    """Without lines of the library's own: what it raises is put in our words."""
    before = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(before)


def _json_options(file: Path) -> dict[str, Any]:
    """{"field": "data"} for a file that is one object around a list of records; {"empty": True} for no records."""
    with open(file, "rb") as f:
        first = f.readline()
        while first and not first.strip():
            first = f.readline()
        rest = f.readline()
    if not first or first.strip() == b"[]":
        return {"empty": True}
    if not first.lstrip().startswith(b"{"):
        return {}
    try:
        record = json.loads(first)
    except ValueError:  # an object over several lines, or a broken line; the latter is reported by the reader
        return {"field": "data"} if file.suffix == ".json" and first.strip() == b"{" else {}
    return {"field": "data"} if not rest and list(record) == ["data"] and isinstance(record["data"], list) else {}


def _csv_options(file: Path) -> dict[str, Any]:
    """Every column is text; nothing is guessed to be a number or missing."""
    import datasets

    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            header = next(csv.reader(f, delimiter=separator))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as csv: {error}") from error
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "sep": separator, "keep_default_na": False}


def _has_dates(features: Any) -> bool:
    return "Value('timestamp" in str(features)


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON or JSON-lines file, by the standard library alone."""
    if _json_options(file).get("field"):
        yield from ((f"{file}: record {i}", r) for i, r in enumerate(json.loads(file.read_bytes())["data"]))
        return
    with open(file, "rb") as f:
        head = f.read(_CHUNK).lstrip()[:1]
        f.seek(0)
        if head == b"[":
            yield from ((f"{file}: record {i}", r) for i, r in enumerate(json.loads(f.read())))
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"{file}: line {number}", json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{file}: line {number}: not UTF-8: {error}") from error
                except ValueError as error:
                    raise UserError(f"{file}: line {number}: not JSON: {error}") from error


def _broken(file: Path, kind: str) -> str:
    """What is wrong with a file that the fast reader refused, with its line; empty when it is not known."""
    if kind != "json":
        return ""
    try:
        for where, record in _json_records(file):
            if not isinstance(record, dict):
                return f"{where}: a record is an object with named columns, not {type(record).__name__}."
    except UserError as error:
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"{file}: not JSON: {error}"
    return ""
