"""Where records come from: files, folders, globs, other stores, saved datasets, hub ids, entries of a registry.

Finding and hashing local files needs no heavy import, so that a store already made is found at once. JSON and text are
read by `lines`, the other kinds through the `datasets` library.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import lzma
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash

from launcher.data import remote
from launcher.data.atomic import appearing
from launcher.data.dataset_info import Entry, read_entry
from launcher.data.hashes import file_hash
from launcher.data.space import full_disk
from launcher.errors import UserError, nearest
from launcher.recipe.schema.data import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

# ending -> how it is read
_KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
    ".txt": "text", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHUNK = 1 << 22
_CSV_ROWS = 10_000  # rows that are written at a time
_DRAWN = 0x5EED  # what num_samples of a registry draws with, so that it draws the same each time


@dataclass(kw_only=True, slots=True)
class Resolved(Source):
    """A source whose path names nothing but files or a hub id: `#500` and `dataset_info.json#name` are read.

    entry: the entry of a dataset_info.json whose rules hold
    """

    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source's path stands for.

    source: the recipe's source, resolved
    kind: files, saved (a folder of `Dataset.save_to_disk`) or hub
    files: the files in order of name, addresses of other stores as text; empty for hub
    """

    source: Source
    kind: str
    files: tuple[Path | remote.Address, ...]

    @property
    def names(self) -> list[str]:
        """What documents say they come from: one name for each table of `load`."""
        return [str(f) for f in self.files] if self.kind == "files" else [self.source.path]


def resolve(source: Source) -> Resolved:
    """Read what stands behind `#` in a path: a number of records, the name of an entry, or one after the other.

    Raises:
        UserError: there is no such entry, or the recipe says the same thing twice.
    """
    if isinstance(source, Resolved):
        return source
    made = Resolved(**{f.name: getattr(source, f.name) for f in fields(Source)})
    if Path(source.path).expanduser().exists() and Path(source.path).name != "dataset_info.json":
        return made
    path, number = re.fullmatch(r"(.*?)(?:#(\d+))?", source.path, re.DOTALL).groups()  # type: ignore[union-attr]
    if number is not None:
        if source.max_samples is not None:
            raise UserError(
                f"{source.path}: #{number} and max_samples = {source.max_samples} say the same thing. Keep one of them."
            )
        if int(number) < 1:
            raise UserError(f"{source.path}: #{number}: expected 1 or more records.")
        made.max_samples = int(number)
    file, _, name = path.rpartition("#")
    if file.endswith(".json") or PurePosixPath(path).name == "dataset_info.json":
        return _from_registry(made, file or path, name if file else "")
    if file and Path(file).expanduser().is_file():
        raise UserError(f"{source.path}: #{name}: expected a number of records, 1 or more, as {file}#500.")
    made.path = path
    return made


def find(source: Source) -> Listing:
    """Say which files a source names, without reading them.

    Raises:
        UserError: nothing lies there, or nothing that can be read.
    """
    source = resolve(source)
    if remote.is_remote(source.path):
        return _listing(source, _known(remote.list_files(source.path)), f"{source.path}: holds no {_endings()} file.")
    path = Path(source.path).expanduser()
    if any(c in source.path for c in "*?[") and not path.exists():
        matches = tuple(sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()))
        return _listing(source, matches, f"{source.path}: the pattern matches no file.")
    if path.is_dir():
        saved = {"state.json", "dataset_dict.json"} & {p.name for p in path.iterdir()}
        files = tuple(sorted(p for p in path.rglob("*") if p.is_file()))
        if saved:
            return Listing(source, "saved", files)
        visible = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        return _listing(source, _known(visible), f"{source.path}: the folder holds no {_endings()} file.")
    if path.is_file():
        return _listing(source, (path,), "")
    if ending(path) in _KINDS or path.is_absolute() or not _HUB_ID.fullmatch(source.path):
        raise UserError(f"{source.path}: no such file or folder.{_similar(path)}")
    return Listing(source, "hub", ())


def fingerprint(listing: Listing, remembered: Path | None = None) -> str:
    """Hash of everything the records are read from, and of how.

    Args:
        remembered: folder in which hashes of local files are kept, so that an unchanged file is not read again.
    """
    digest = xxhash.xxh3_128()
    source = listing.source
    entry = getattr(source, "entry", None)
    how = (source.format, source.columns, source.tags, source.max_samples, repr(entry and (entry, entry.columns)))
    digest.update(repr((listing.kind, source.split, source.subset, source.folder, how)).encode())
    if listing.kind == "hub":
        digest.update(load(listing, Path())[0]._fingerprint.encode())
    for file in listing.files:
        if isinstance(file, str):
            digest.update(repr((PurePosixPath(file).suffixes, remote.stamp(file))).encode())
            continue
        digest.update(repr((file.suffix, file_hash(file, remembered))).encode())
    return digest.hexdigest()


def load(listing: Listing, scratch: Path) -> list[Any]:
    """The records as tables, one for each of `listing.names`, row for row as in files.

    A table is a memory-mapped `datasets.Dataset`, or what has its length, column_names, select and data.nbytes.

    Args:
        scratch: folder for places of records, for Arrow copies, and for what is fetched or compressed.
    Raises:
        UserError: a file cannot be read as what its ending says; names the file and, where known, the line.
    """
    source = listing.source
    if listing.kind == "hub":
        tables = [_load_hub(source)]
    elif listing.kind == "saved":
        tables = [_load_saved(source)]
    else:
        tables = [_load_file(_local(file, scratch), scratch, str(file)) for file in listing.files]
    entry = getattr(source, "entry", None)
    return _drawn(tables, entry.num_samples) if entry is not None and entry.num_samples else tables


def records(table: Any, begin: int, end: int, name: str) -> list[dict[str, Any]]:
    """Rows begin:end of a table of `load`.

    Raises:
        UserError: a row cannot be read, which shows only now; names file and record.
    """
    if hasattr(table, "records"):
        found: list[dict[str, Any]] = table.records(begin, end)
        return found
    try:
        columns = table[begin:end]
    except UnicodeDecodeError as error:
        if end - begin > 1:
            middle = (begin + end) // 2
            return records(table, begin, middle, name) + records(table, middle, end, name)
        raise UserError(f"{place(name, begin)}: not UTF-8: {error}. Save the file as UTF-8.") from error
    columns = {column: [without_nulls(value) for value in values] for column, values in columns.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def record_number(table: Any, row: int) -> int:
    """Which record of its file a row of a table is, from 0."""
    return int(table.rows[row]) if isinstance(table, Drawn) else row


def place(name: str, record: int) -> str:
    """How messages name a record: its index from 0, and its row as people count."""
    return f"{name}: record {record} (row {record + 1})"


def ending(file: Path | str) -> str:
    """What a file's name says it holds, without the ending of a compression."""
    path = PurePosixPath(file)
    return PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


@dataclass(frozen=True, slots=True)
class Drawn:
    """Some rows of a table, in an order of their own; a row may come twice."""

    table: Any
    rows: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def column_names(self) -> list[str]:
        return list(self.table.column_names)

    @property
    def data(self) -> Drawn:
        return self

    @property
    def nbytes(self) -> int:
        return int(self.table.data.nbytes * len(self.rows) / max(1, len(self.table)))

    def select(self, rows: Sequence[int]) -> Drawn:
        return Drawn(self.table, self.rows[rows[0] : rows[-1] + 1] if len(rows) else self.rows[:0])

    def records(self, begin: int, end: int) -> list[dict[str, Any]]:
        return [records(self.table, int(row), int(row) + 1, "")[0] for row in self.rows[begin:end]]


def _drawn(tables: list[Any], count: int) -> list[Any]:
    """`count` records of all tables, by chance; where there are fewer, each is drawn again only after all others."""
    import numpy as np

    ends = np.cumsum([len(table) for table in tables])
    total, random = int(ends[-1]), np.random.default_rng(_DRAWN)
    rounds = [random.permutation(total)[: count - done] for done in range(0, count if total else 0, max(1, total))]
    found = []
    for table, end in zip(tables, ends.tolist(), strict=True):
        begin, rows = end - len(table), np.zeros(0, dtype=np.int64)
        for drawn in rounds:
            own = drawn[(drawn >= begin) & (drawn < end)] - begin
            if own.size and rows.size and own[0] == rows[-1]:
                own = np.roll(own, 1)  # two neighbours of one record would be taken for its pieces
            rows = np.concatenate([rows, own])
        found.append(Drawn(table, rows))
    return found


def _from_registry(made: Resolved, registry: str, name: str) -> Resolved:
    for key in ("columns", "tags", "folder", "subset", "split"):
        if getattr(made, key) is not None:
            raise UserError(f"{made.path}: {key} stands in the entry of the registry. Remove it here.")
    if made.format != "auto":
        raise UserError(f"{made.path}: format = {made.format}: the registry's entry says it. Remove it here.")
    made.entry, where = read_entry(Path(registry).expanduser(), name)
    made.path, made.split, made.subset, made.folder = (where[key] for key in ("path", "split", "subset", "folder"))
    if made.entry.num_samples and made.max_samples:
        made.max_samples = min(made.max_samples, made.entry.num_samples)
    return made


def _known(files: Sequence[Path] | Sequence[remote.Address]) -> tuple[Path | remote.Address, ...]:
    return tuple(f for f in files if ending(f) in _KINDS)


def _listing(source: Source, files: tuple[Path | remote.Address, ...], none: str) -> Listing:
    if not files:
        raise UserError(none)
    if source.split == "train" and getattr(source, "entry", None) is not None:
        source.split = None  # what LLaMA-Factory calls all of a file
    for key in ("split", "subset", "folder"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.path}: {key} = {getattr(source, key)}, but files have none. Remove the key.")
    for file in files:
        if ending(file) not in _KINDS:
            raise UserError(f"{file}: cannot read '{ending(file)}' files, expected {_endings()}.")
    return Listing(source, "files", files)


def _endings() -> str:
    return f"{', '.join(_KINDS)} (also with {', '.join(_COMPRESSED)})"


def _similar(path: Path) -> str:
    folder = path.parent
    hint = nearest(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
    return f" {hint}" if hint else ""


def _local(file: Path | remote.Address, scratch: Path) -> Path:
    """A file on this machine, uncompressed: itself, or a copy in `scratch`."""
    copies = scratch / "copies"
    if isinstance(file, str):
        file = remote.fetch(file, copies / xxhash.xxh3_64_hexdigest(file.encode()) / PurePosixPath(file).name)
    if file.suffix not in _COMPRESSED:
        return file
    plain = copies / xxhash.xxh3_64_hexdigest(str(file).encode()) / file.stem
    plain.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _COMPRESSED[file.suffix](file, "rb") as source, appearing(plain) as made, open(made, "wb") as copy:
            shutil.copyfileobj(source, copy, _CHUNK)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise full_disk(error) or UserError(
            f"{file}: cannot be uncompressed: {error}. Make the file again, or rename it to what it is."
        ) from error
    return plain


def _load_saved(source: Source) -> Any:
    import datasets

    try:
        table = datasets.load_from_disk(str(Path(source.path).expanduser()))
    except Exception as error:
        raise UserError(f"{source.path}: cannot be read as a saved dataset: {type(error).__name__}: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        split = source.split or "train"
        if split not in table:
            raise UserError(f"{source.path}: no split '{split}', it has {', '.join(table)}.")
        table = table[split]
    return _undecoded(table)


def _load_hub(source: Source) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = {} if source.folder is None else {"data_dir": source.folder}
    try:
        table = datasets.load_dataset(source.path, name=source.subset, split=source.split or "train", **folder)
    except Exception as error:
        raise UserError(
            f"{source.path}: no such file or folder, and the hub gave no such dataset: {type(error).__name__}: {error}"
        ) from error
    return _undecoded(table)


def _load_file(file: Path, scratch: Path, name: str) -> Any:
    from launcher.data.lines import Lines

    kind = _KINDS[file.suffix]
    if kind in ("json", "text"):
        return Lines.open(file, scratch, plain=kind == "text", name=name)
    import datasets  # it takes seconds to import, and JSON needs it not

    datasets.disable_progress_bars()
    if file.stat().st_size == 0:
        return datasets.Dataset.from_dict({})
    if kind == "csv":
        return _load_csv(file, scratch, name)
    try:
        with _unlogged(datasets.utils.logging):
            table = datasets.load_dataset(kind, data_files=[str(file)], split="train", cache_dir=str(scratch))
    except Exception as error:
        if full := full_disk(error):
            raise full from error
        raise UserError(
            f"{name}: cannot be read as {kind}: {error.__cause__ or error}. Make it again, or rename it to what it is."
        ) from error
    return _undecoded(table)


def _undecoded(table: Any) -> Any:
    """Images and the like stay the bytes they are; nothing here looks into them."""
    for column, feature in (table.features or {}).items():
        if type(feature).__name__ in ("Image", "Audio", "Video"):
            table = table.cast_column(column, type(feature)(decode=False))
    return table


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that are null: a table gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(inner) for inner in value]
    return value


@contextmanager
def _unlogged(log: Any) -> Iterator[None]:
    """Without lines of the library's own: what it raises is put in our words."""
    before = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(before)


def _load_csv(file: Path, scratch: Path, name: str) -> Any:
    """Every column is text; nothing is guessed to be a number or missing, and every row has a value for each."""
    import datasets
    import pyarrow as pa

    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / f"{xxhash.xxh3_64_hexdigest(str(file).encode())}.arrow"
    rows = _csv_rows(file, name)
    header = next(rows, [])
    schema = pa.schema([(column, pa.large_string()) for column in header])
    with appearing(copy) as made, pa.OSFile(str(made), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
        batch: list[list[str]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _CSV_ROWS:
                writer.write_batch(_batch(batch, schema))
                batch = []
        writer.write_batch(_batch(batch, schema))
    return datasets.Dataset.from_file(str(copy))


def _batch(rows: list[list[str]], schema: Any) -> Any:
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    return pa.record_batch([pa.array(column, schema.field(0).type) for column in columns], schema=schema)


def _csv_rows(file: Path, name: str) -> Iterator[list[str]]:
    """The header, then the rows, each as long as the header.

    Raises:
        UserError: names the line.
    """
    csv.field_size_limit(sys.maxsize)
    line, row = 0, -1
    with open(file, newline="", encoding="utf-8-sig") as f:
        reader = csv.reader(f, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        header: list[str] = []
        try:
            for cells in reader:
                line = reader.line_num
                if not cells:
                    continue
                if not header:
                    header = cells
                    _check_header(header, name)
                elif len(cells) != len(header):
                    raise UserError(
                        f"{place(name, row)}, line {line}: has {len(cells)} values, but the header names {len(header)} "
                        f"columns ({', '.join(header)}). Put values that hold a comma or a new line between quotes."
                    )
                elif any("\0" in cell for cell in cells):
                    raise UserError(f"{place(name, row)}, line {line}: holds a NUL byte, so this is no text.")
                row += 1
                yield cells
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: cannot be read as csv: line {_odd_line(file)}: not UTF-8: {error}. Save the file as UTF-8."
            ) from error
        except csv.Error as error:
            raise UserError(
                f"{name}: cannot be read as csv: line {reader.line_num}: {error}. A quote that is opened must be "
                f"closed, and one inside a value is written twice."
            ) from error


def _odd_line(file: Path) -> int:
    """Number of the first line that is not UTF-8, from 1; 0 for none."""
    with open(file, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _check_header(header: list[str], name: str) -> None:
    if any("\0" in cell for cell in header):
        raise UserError(f"{name}: holds NUL bytes, so it is no UTF-8 text but a binary file.")
    twice = {column for column in header if header.count(column) > 1}
    if twice or "" in header:
        what = f"names column {sorted(twice)[0]} twice" if twice - {""} else "has a column without a name"
        raise UserError(f"{name}: line 1: the header {what}. Every column needs a name of its own.")
