"""Files of JSON or of lines as tables: where each record lies is found in one pass; it is read when it is asked for.

A record is what the file says, whatever the others hold: no column is made for keys of other records, no type is
inferred. The places of the records are kept in a file, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.data.atomic import appearing
from launcher.data.formats.values import complaint
from launcher.errors import UserError

_CHUNK = 1 << 24  # bytes read at a time
_LOOKED_AT = 16  # records whose columns are those of the table
_SPAN = 1 << 26  # bytes of several records that are read in one go
_SHORT = 64  # lines up to so long are looked at for being blank
_NEWLINE, _BLANK = 10, (9, 13, 32)
_BOM = b"\xef\xbb\xbf"
_CUT = 64  # a mistake so near to the end of what was read may be the end itself
_DEEP = "nested too deeply to be read"
_FOREIGN = {
    b"PAR1": "a parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "compressed with gzip", b"PK\x03\x04": "a zip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lines:
    """Records of a file, read by their places in it.

    file: where they lie
    name: how messages call the file
    index: file of [records, 2] int64, first and last + 1 byte of each
    begin, end: which of them belong to the table
    plain: whether a record is a line of text, else it is JSON
    """

    file: str
    name: str
    index: str
    begin: int
    end: int
    plain: bool

    @classmethod
    def open(cls, file: Path, scratch: Path, *, plain: bool, name: str | None = None) -> Lines:
        """A file of JSON lines, of one JSON list, or (`plain`) of text lines.

        Raises:
            UserError: the file is something else, or its list is broken.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        index = scratch / f"{xxhash.xxh3_64_hexdigest(str(file).encode())}.index"
        named = name or str(file)
        with open(file, "rb") as f, appearing(index) as made, open(made, "wb") as out:
            head = f.read(4096)
            _refuse_foreign(head, named)
            start = len(_BOM) if head.startswith(_BOM) else 0
            opening, at = _opening(f, start)
            if not plain and (opening == b"[" or (field := _wrapped(f, at, named))):
                for place in _items(f, named, at if opening == b"[" else field):
                    out.write(struct.pack("=2q", *place))
            else:
                _find_lines(f, start, out, keep_blank=plain)
        return cls(str(file), named, str(index), 0, index.stat().st_size // 16, plain)

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def column_names(self) -> list[str]:
        """Those of the first records."""
        first = self.records(0, min(len(self), _LOOKED_AT))
        return list(dict.fromkeys(name for record in first for name in record))

    @property
    def nbytes(self) -> int:
        """Of the records, as they stand in the file."""
        places = self._places(0, len(self))
        return int(places[-1, 1] - places[0, 0]) if len(places) else 0

    @property
    def data(self) -> Lines:
        """Itself, so that `table.data.nbytes` is what it is for a `datasets.Dataset`."""
        return self

    def select(self, rows: Sequence[int]) -> Lines:
        """The table of a range of rows."""
        begin = self.begin + (rows[0] if len(rows) else 0)
        return Lines(self.file, self.name, self.index, begin, begin + len(rows), self.plain)

    def records(self, begin: int, end: int) -> list[dict[str, Any]]:
        """Records begin:end, as far as there are so many.

        Raises:
            UserError: one cannot be read; names file, record and line.
        """
        end = min(end, len(self))
        places = self._places(begin, end).tolist()
        if not places:
            return []
        start, stop = places[0][0], places[-1][1]
        if stop - start > _SPAN and len(places) > 1:
            middle = (begin + end) // 2
            return self.records(begin, middle) + self.records(middle, end)
        with open(self.file, "rb") as f:
            raw = os.pread(f.fileno(), stop - start, start)
        numbers = range(self.begin + begin, self.begin + end)
        halves = not self.plain and (b"\\ud" in raw or b"\\uD" in raw)  # of characters: rare, and dear to look for
        return [
            self._read(raw[first - start : last - start], number, first, halves=halves)
            for number, (first, last) in zip(numbers, places, strict=True)
        ]

    def _places(self, begin: int, end: int) -> NDArray[np.int64]:
        return np.fromfile(
            self.index, dtype=np.int64, count=max(0, 2 * (end - begin)), offset=16 * (self.begin + begin)
        ).reshape(-1, 2)  # fmt: skip

    def _read(self, raw: bytes, number: int, at: int, *, halves: bool) -> dict[str, Any]:
        try:
            text = raw.decode("utf-8")
            record = {"text": text.removesuffix("\r")} if self.plain else json.loads(text)
            if not isinstance(record, dict):
                what = type(record).__name__
                raise self._broken(number, at, f"a record is an object with named columns, not {what}.")
            if halves:
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise self._broken(number, at, f"not UTF-8: {error}. Save the file as UTF-8.") from error
        except UnicodeEncodeError as error:
            raise self._broken(number, at, "holds one half of a \\ud... pair, which is no character.") from error
        except RecursionError as error:
            raise self._broken(number, at, _DEEP) from error
        except ValueError as error:
            raise self._broken(
                number, at, f"not JSON: {complaint(error)}. Write the record whole, on a line of its own."
            ) from error
        if self.plain and "\0" in text:
            raise self._broken(number, at, "holds a NUL byte, so this is no text.")
        return record

    def _broken(self, number: int, at: int, what: str) -> UserError:
        line = _line(self.file, at)
        return UserError(f"{self.name}: record {number} (row {number + 1}), line {line}: {what}")


def _opening(f: BinaryIO, start: int) -> tuple[bytes, int]:
    """The first byte that is not white space, and its place."""
    f.seek(start)
    at = start
    while chunk := f.read(_CHUNK):
        if stripped := chunk.lstrip():
            return stripped[:1], at + len(chunk) - len(stripped)
        at += len(chunk)
    return b"", at


def _refuse_foreign(head: bytes, name: str) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{name}: is {what}, not UTF-8 text. Rename it to its true ending, or convert it.")
    if b"\0" in head:
        raise UserError(f"{name}: holds NUL bytes, so it is no UTF-8 text but a binary file.")


def _find_lines(f: BinaryIO, start: int, out: BinaryIO, *, keep_blank: bool) -> None:
    """Write the places of the lines that are not blank."""
    f.seek(start)
    base = start
    while chunk := f.read(_CHUNK):
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == _NEWLINE) + base
        if ends.size:
            begins = np.concatenate(([start], ends[:-1] + 1))
            start = int(ends[-1]) + 1
            places = np.stack([begins, ends], axis=1)
            (places if keep_blank else places[~_are_blank(f, places, data, base)]).astype(np.int64).tofile(out)
        base += len(chunk)
    if start < base:
        last = os.pread(f.fileno(), _SHORT + 1, start)
        if keep_blank or len(last) > _SHORT or last.strip():
            np.array([start, base], dtype=np.int64).tofile(out)


def _are_blank(f: BinaryIO, places: NDArray[Any], data: NDArray[np.uint8], base: int) -> NDArray[np.bool_]:
    """Which lines hold white space alone; only short ones are."""
    first = np.where(places[:, 0] >= base, data[np.clip(places[:, 0] - base, 0, len(data) - 1)], _BLANK[0])
    maybe = (places[:, 1] - places[:, 0] <= _SHORT) & np.isin(first, (_NEWLINE, *_BLANK))
    blank = np.zeros(len(places), dtype=bool)
    for i in np.flatnonzero(maybe):
        begin, end = places[i].tolist()
        blank[i] = not os.pread(f.fileno(), end - begin, begin).strip()
    return blank


def _wrapped(f: BinaryIO, at: int, name: str) -> int:
    """Place of the list in a file that is one object {"data": [...]}; 0 for lines.

    Raises:
        UserError: one object over several lines, without such a list.
    """
    f.seek(at)
    first = f.readline()
    try:
        record = json.loads(first)
        if not isinstance(record, dict) or not isinstance(record.get("data"), list):
            return 0
        alone = name.endswith(".json") and not f.read(_SHORT).strip() and any(map(_is_object, record["data"]))
        if list(record) != ["data"] and not alone:
            return 0
    except (ValueError, RecursionError):  # an object over several lines, or a broken line; that one is found when read
        if first.strip() != b"{" and not name.endswith(".json"):
            return 0
    window = _Window(f, name, at)
    try:
        return window.find_list("data")
    except UserError:
        if first.strip() == b"{":
            raise
        return 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _items(f: BinaryIO, name: str, at: int) -> Iterator[tuple[int, int]]:
    """Places of the elements of the JSON list that begins at a place."""
    window = _Window(f, name, at)
    window.expect("[")
    if window.peek() == "]":
        window.expect("]")
    else:
        while True:
            yield window.value()
            if window.peek() == "]":
                window.expect("]")
                break
            window.expect(",")
    rest = window.peek()
    if rest not in ("", "}", ","):
        raise window.broken(f"'{rest}' follows the end of the list")


class _Window:
    """Walks over the JSON of a file of any size; holds a piece of it as latin-1, in which places are bytes."""

    def __init__(self, f: BinaryIO, name: str, at: int) -> None:
        self._file, self._name = f, name
        self._base, self._at = at, 0
        self._text = ""
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Step over a character."""
        if (found := self.peek()) != character:
            raise self.broken(f"expected '{character}', found {repr(found) if found else 'the end of the file'}")
        self._at += 1

    def value(self) -> tuple[int, int]:
        """Step over a value; its place."""
        self.peek()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unended, ahead = error.msg.startswith("Unterminated string"), error.pos - self._at
                if (unended or error.pos >= len(self._text) - _CUT) and self._more():
                    continue
                self._at = min(self._at + ahead, len(self._text))
                cut = unended or self._at >= len(self._text.rstrip())
                raise self.broken(f"{error.msg}{'; the file ends in the middle' if cut else ''}") from error
            except RecursionError as error:
                raise self.broken(_DEEP) from error
            place = (self._base + self._at, self._base + end)
            self._at = end
            return place

    def find_list(self, key: str) -> int:
        """Place of the list under a key of the object that begins here."""
        self.expect("{")
        names = []
        while self.peek() == '"':
            begin, end = self.value()
            names.append(json.loads(os.pread(self._file.fileno(), end - begin, begin)))
            self.expect(":")
            if names[-1] == key and self.peek() == "[":
                return self._base + self._at
            self.value()
            if self.peek() != ",":
                break
            self.expect(",")
        if self.peek() == "}":
            self.expect("}")
            if self.peek() == "{":
                raise self.broken("a record over several lines. Write a record on a line, or all as one list")
            held = ", ".join(names)
            raise UserError(
                f"{self._name}: is one object ({held}), expected a list of records, a record a line, or "
                f"{{'data': [...]}}."
            )
        raise self.broken(f"expected a key, found {self.peek()!r}")

    def broken(self, what: str) -> UserError:
        """An error that names the line."""
        return UserError(f"{self._name}: line {_line(self._file.name, self._base + self._at)}: not JSON: {what}.")

    def _more(self) -> bool:
        """Read on; what is behind is let go, what is ahead at least doubles."""
        ahead = self._text[self._at :]
        self._base, self._at = self._base + self._at, 0
        read = os.pread(self._file.fileno(), max(_CHUNK // 4, len(ahead)), self._base + len(ahead))
        self._text = ahead + read.decode("latin-1")
        return bool(read)


def _line(file: str, at: int) -> int:
    """Number of the line in which a byte lies, from 1."""
    count = 1
    with open(file, "rb") as f:
        while at > 0 and (chunk := f.read(min(_CHUNK, at))):
            count += chunk.count(b"\n")
            at -= len(chunk)
    return count
