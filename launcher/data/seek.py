"""Files that can be read from any place on: the records that begin in a range of a file, and where the next one begins.

Places are bytes in files of lines, else rows. A read is the same whoever asks and whatever was read before, so a place
is all that a reader has to remember.
"""

from __future__ import annotations

import bisect
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import xxhash

from launcher.data.remote import is_remote
from launcher.data.remote import stamp as remote_stamp
from launcher.data.sources import Listing, load, place, records, without_nulls
from launcher.errors import UserError

_LINES, _PARQUET = (".jsonl", ".ndjson", ".txt"), (".parquet",)  # read from any place; other files are copied first
_CHUNK = 1 << 20  # bytes of lines, or ...
_TAIL = 1 << 16  # bytes read at a time behind it, to the end of the last line
_ROWS = 256  # ... rows, that one read gives at most
_COUNTED = 1 << 30  # bytes up to which lines are counted to name one
_GROUPS, _FILES, _TABLES = 4, 32, 32  # row groups, open files and tables that a rank keeps
_T = TypeVar("_T")

Found = list[tuple[int, Any]]  # (place, record)


class File(Protocol):
    """One file of a source.

    name: how messages call it
    in_bytes: whether places are bytes, else they are rows
    """

    name: str
    in_bytes: bool

    def extent(self) -> int:
        """One more than the last place at which a record may begin."""

    def read(self, begin: int, end: int) -> tuple[Found, int]:
        """Records that begin in [begin, end), perhaps not all of them, and the place to go on from.

        Raises:
            UserError: a record cannot be read; names file and record.
        """

    def place(self, at: int) -> str:
        """How messages name the record at a place."""


class Kept:
    """The newest few of what is dear to make, by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], _T]) -> _T:
        """The value of a key, made if it is not kept."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        value: _T = self._values[key]
        return value


@dataclass(slots=True)
class Shelf:
    """What the files of a rank share: open handles and decoded tables, the newest few.

    scratch: folder for copies of files that cannot be read from any place
    """

    scratch: Path
    handles: Kept = field(default_factory=lambda: Kept(_FILES))
    groups: Kept = field(default_factory=lambda: Kept(_GROUPS))
    tables: Kept = field(default_factory=lambda: Kept(_TABLES))


def open_files(listing: Listing, shelf: Shelf) -> list[File]:
    """The files of a source, in order of name; those that cannot be read from any place are opened when needed."""
    if listing.kind == "saved":
        return [_Table(listing, shelf)]
    return [_file(replace(listing, files=(file,)), shelf) for file in listing.files]


def _file(listing: Listing, shelf: Shelf) -> File:
    path = str(listing.files[0])
    suffix = PurePosixPath(path).suffix
    if suffix in _LINES or (suffix == ".json" and _is_lines(path)):
        return _Lines(path, shelf)
    return _Parquet(path, shelf) if suffix in _PARQUET else _Table(listing, shelf)


def open_bytes(path: str) -> Any:
    """A file of this machine, or of any store that fsspec knows, for reading; nothing is read but what is asked for."""
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 16)
    import fsspec

    system, inside = fsspec.core.url_to_fs(path)
    return system.open(inside, "rb", cache_type="none")


def size_of(path: str) -> int:
    """Bytes of a file, wherever it lies."""
    if not is_remote(path):
        return Path(path).stat().st_size
    import fsspec

    system, inside = fsspec.core.url_to_fs(path)
    return int(system.size(inside))


def stamp(path: str) -> str:
    """What changes when a file does."""
    if is_remote(path):
        return remote_stamp(path)
    found = Path(path).stat()
    return f"{found.st_size} {found.st_mtime_ns}"


class _Lines:
    """Places are bytes; a record is a line, and belongs to the range in which its first byte lies."""

    in_bytes = True

    def __init__(self, path: str, shelf: Shelf) -> None:
        self.name, self._shelf = path, shelf
        self._text = Path(path).suffix == ".txt"
        self._size: int | None = None

    def extent(self) -> int:
        if self._size is None:
            self._size = size_of(self.name)
        return self._size

    def read(self, begin: int, end: int) -> tuple[Found, int]:
        end = min(end, begin + _CHUNK)
        handle = self._shelf.handles.get(self.name, lambda: open_bytes(self.name))
        start = max(begin - 1, 0)  # whether a line begins at `begin` is seen in the byte before it
        handle.seek(start)
        data = handle.read(end - start)
        first = data.find(b"\n") + 1 if begin else 0
        if (begin and not first) or first >= len(data):
            return [], end
        while not data.endswith(b"\n") and (more := handle.read(_TAIL)):
            data += more[: more.find(b"\n") + 1] or more
        found, at = [], start + first
        for line in data[first:].removesuffix(b"\n").split(b"\n"):
            if self._text or line.strip():
                found.append((at, self._record(line, at)))
            at += len(line) + 1
        return found, max(at, end)

    def _record(self, line: bytes, at: int) -> Any:
        if at == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8")
            record = {"text": text.removesuffix("\r")} if self._text else json.loads(text)
            if not self._text and (b"\\ud" in line or b"\\uD" in line):
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place(at)}: not UTF-8: {error}. Save the file as UTF-8.") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{self.place(at)}: holds one half of a \\ud... pair, which is no character.") from error
        except RecursionError as error:
            raise UserError(f"{self.place(at)}: nested too deeply to be read.") from error
        except ValueError as error:
            raise UserError(f"{self.place(at)}: not JSON: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{self.place(at)}: a record is an object with named columns, not {kind}.")
        return record

    def place(self, at: int) -> str:
        if at > _COUNTED:
            return f"{self.name}: the line at byte {at}"
        lines, left = 1, at
        with open_bytes(self.name) as file:
            while left and (data := file.read(min(_CHUNK, left))):
                lines, left = lines + data.count(b"\n"), left - len(data)
        return f"{self.name}: line {lines} (byte {at})"


class _Parquet:
    """Places are rows; a row group is decoded once for all readers of the rank that are in it."""

    in_bytes = False

    def __init__(self, path: str, shelf: Shelf) -> None:
        self.name, self._shelf = path, shelf
        self._starts: list[int] | None = None

    def extent(self) -> int:
        return self._groups()[-1]

    def read(self, begin: int, end: int) -> tuple[Found, int]:
        starts = self._groups()
        group = bisect.bisect_right(starts, begin) - 1
        end = min(end, begin + _ROWS, starts[group + 1])
        table = self._shelf.groups.get((self.name, group), lambda: self._open().read_row_group(group))
        try:
            rows = table.slice(begin - starts[group], end - begin).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: rows {begin + 1} to {end}: not UTF-8: {error}") from error
        found = [{column: without_nulls(value) for column, value in row.items()} for row in rows]
        return list(enumerate(found, begin)), end

    def place(self, at: int) -> str:
        return place(self.name, at)

    def _groups(self) -> list[int]:
        """First row of each row group, then the number of rows."""
        if self._starts is None:
            footer = self._open().metadata
            self._starts = [0]
            for group in range(footer.num_row_groups):
                self._starts.append(self._starts[-1] + footer.row_group(group).num_rows)
        return self._starts

    def _open(self) -> Any:
        return self._shelf.handles.get(self.name, self._opened)

    def _opened(self) -> Any:
        import pyarrow.parquet as parquet

        try:
            return parquet.ParquetFile(open_bytes(self.name), pre_buffer=True)
        except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
            raise UserError(f"{self.name}: cannot be read as parquet: {error}") from error


class _Table:
    """Places are rows of a table as `prepare` makes it; a file that has no seekable form is copied into one first."""

    in_bytes = False

    def __init__(self, listing: Listing, shelf: Shelf) -> None:
        (self.name,), self._listing, self._shelf = listing.names, listing, shelf

    def extent(self) -> int:
        return len(self._table())

    def read(self, begin: int, end: int) -> tuple[Found, int]:
        end = min(end, begin + _ROWS)
        return list(enumerate(records(self._table(), begin, end, self.name), begin)), end

    def place(self, at: int) -> str:
        return place(self.name, at)

    def _table(self) -> Any:
        return self._shelf.tables.get(self.name, self._loaded)

    def _loaded(self) -> Any:
        made_of = [(str(file), stamp(str(file))) for file in self._listing.files]
        return load(self._listing, self._shelf.scratch / xxhash.xxh3_64_hexdigest(repr(made_of).encode()))[0]


def _is_lines(path: str) -> bool:
    """Whether a .json file holds a record a line: its first line is an object by itself, and more follow."""
    with open_bytes(path) as file:
        first = file.readline(_CHUNK)
        try:
            return isinstance(json.loads(first), dict) and bool(file.readline(_CHUNK).strip())
        except ValueError:
            return False
