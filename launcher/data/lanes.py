"""One lane of a stream: which records it reads, how they are mixed, shuffled and packed, and the state it goes on from.

A stream has as many lanes as a global batch has rows; lane j gives row j of every global batch. What a lane gives
rests on nothing but its number, the sources and its own state, so who owns it does not matter, nor when it changed
hands. Files are cut into blocks; in each epoch every block belongs to one lane, another one each epoch.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.data.formats import Example, Format, Skip
from launcher.data.order import permute
from launcher.data.seek import File
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.data.encoder import Group

COMPARED = "answers to compare or to judge need the stores of `launcher prepare`. Set data.streaming=false."
OPEN_ROWS = 8  # rows of best_fit that are filled at a time
WHOLE_FILE = 1 << 60  # a block size that no file reaches
_TOGETHER = 32  # records tokenised in one call
_MANY_EPOCHS = 1000  # epochs without a record, times the lanes, after which a source counts as empty
_MANY_DROPPED = 1000  # records dropped in a row, through two ends of the source, after which it counts as useless

Tokenise = Callable[[Sequence[tuple[str, Example]]], Iterable["Group"]]  # as `Encoder.encode`


@dataclass(frozen=True, slots=True)
class Rules:
    """What all lanes of a stream have in common.

    lanes: how many there are, which is the rows of a global batch
    buffer: documents among which one lane shuffles
    by: what the sources' shares are shares of
    vocab_size: ids that the model has
    """

    lanes: int
    seed: int
    seq_len: int
    packing: Literal["best_fit", "concat", "none"]
    overlong: Literal["error", "drop", "truncate", "split"]
    buffer: int
    by: Literal["tokens", "documents"]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Feed:
    """A source as every lane reads it.

    share: of the mix, against the other sources'
    block: places that belong to one lane together
    """

    name: str
    files: Sequence[File]
    form: Format
    share: float
    block: int


@dataclass(frozen=True, slots=True)
class Position:
    """The next record of one source: how often the source was gone through, which file of the epoch, where in it."""

    epoch: int = 0
    turn: int = 0
    at: int = 0


@dataclass(frozen=True, slots=True)
class Streamed:
    """One document, or a piece of one, on its way through a lane; never changed.

    tokens: [length] uint32; weights: [length] uint8 or float32
    source, file: indices into the feeds and their files; at: the record's place in the file
    start: first token of the piece in its document
    """

    tokens: NDArray[Any]
    weights: NDArray[Any]
    source: int
    file: int
    at: int
    start: int = 0

    def cut(self, begin: int, end: int) -> Streamed:
        """Tokens begin:end of it."""
        tokens, weights = self.tokens[begin:end], self.weights[begin:end]
        return Streamed(tokens, weights, self.source, self.file, self.at, self.start + begin)


@dataclass(frozen=True, slots=True)
class LaneState:
    """All that a lane goes on from; taken without a copy, because documents never change.

    taken: what each source has given, in units of the mix
    draws: documents drawn from the shuffle buffer
    waiting: pieces that are read and not yet in the buffer
    rows: rows that are being filled
    dropped, changed: documents left out, cut or repaired, by reason; first: reason -> the first one
    """

    positions: tuple[Position, ...]
    taken: tuple[float, ...]
    draws: int = 0
    buffer: tuple[Streamed, ...] = ()
    waiting: tuple[Streamed, ...] = ()
    rows: tuple[tuple[Streamed, ...], ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, str] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays of plain types; `from_arrays` is the way back.

        documents: [n, 6] int64: length, source, file, place, start, and where it is: -1 buffer, -2 waiting, else a row
        """
        held = [(-1, d) for d in self.buffer] + [(-2, d) for d in self.waiting]
        held += [(number, d) for number, row in enumerate(self.rows) for d in row]
        documents = [d for _, d in held]
        weights = np.concatenate([d.weights for d in documents]) if documents else np.zeros(0, np.uint8)
        whole = bool(np.all(weights == weights.astype(np.uint8)))
        words = {"draws": self.draws, "dropped": self.dropped, "changed": self.changed, "first": self.first}
        table = [(d.tokens.size, d.source, d.file, d.at, d.start, where) for where, d in held]
        return {
            "positions": np.array([(p.epoch, p.turn, p.at) for p in self.positions], np.int64),
            "taken": np.array(self.taken, np.float64),
            "documents": np.array(table, np.int64).reshape(-1, 6),
            "tokens": np.concatenate([d.tokens for d in documents] or [np.zeros(0)]).astype(np.uint32).view(np.int32),
            "weights": weights.astype(np.uint8 if whole else np.float32),
            "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LaneState:
        """The state that `arrays` was made of; they may have been flattened."""
        words = json.loads(arrays["words"].tobytes())
        tokens, weights, at = arrays["tokens"].view(np.uint32), arrays["weights"], 0
        places: dict[int, list[Streamed]] = {}
        for length, source, file, place, start, where in arrays["documents"].reshape(-1, 6).tolist():
            document = Streamed(tokens[at : at + length], weights[at : at + length], source, file, place, start)
            places.setdefault(where, []).append(document)
            at += length
        return cls(
            positions=tuple(Position(*row) for row in arrays["positions"].reshape(-1, 3).tolist()),
            taken=tuple(arrays["taken"].tolist()), draws=words["draws"], buffer=tuple(places.pop(-1, ())),
            waiting=tuple(places.pop(-2, ())), rows=tuple(tuple(places[row]) for row in sorted(places)),
            dropped=words["dropped"], changed=words["changed"], first=words["first"],
        )  # fmt: skip


class Lane:
    """Gives one row after the other.

    Args:
        number: which lane, from 0
        tokenise: (where, example) pairs to what each becomes; its errors begin with `where`
        state: to go on from; None: the beginning
    """

    def __init__(
        self, number: int, feeds: Sequence[Feed], rules: Rules, tokenise: Tokenise, state: LaneState | None = None
    ) -> None:
        self.number, self._feeds, self._rules = number, feeds, rules
        state = state or LaneState(tuple(Position() for _ in feeds), tuple(self._phases()))
        self._losses = _Losses(Counter(state.dropped), Counter(state.changed), dict(state.first))
        self._readers = [
            _Reader(feed, i, number, rules, tokenise, self._losses, state.positions[i]) for i, feed in enumerate(feeds)
        ]
        self._taken, self._draws = list(state.taken), state.draws
        self._buffer, self._waiting, self._rows = list(state.buffer), deque(state.waiting), list(state.rows)
        self._sizes = [sum(document.tokens.size for document in row) for row in self._rows]

    def row(self) -> tuple[Streamed, ...]:
        """The documents of the next row, at most seq_len tokens; one of which nothing is trained is left out.

        Raises:
            UserError: a record cannot be read or learnt from; names file and record.
        """
        packers = {"best_fit": self._best_fit, "concat": self._concat, "none": lambda: (self._draw(),)}
        while True:
            row = packers[self._rules.packing]()
            if any(np.any(document.weights[1:]) for document in row):
                return row
            for document in row:
                name = partial(self._readers[document.source].place, document.file, document.at)
                self._losses.count(self._losses.dropped, "no trained token in their row", name)

    def state(self) -> LaneState:
        """What the next row follows from; costs no copy of tokens."""
        return LaneState(
            tuple(reader.position for reader in self._readers), tuple(self._taken), self._draws, tuple(self._buffer),
            tuple(self._waiting), tuple(self._rows), dict(self._losses.dropped), dict(self._losses.changed),
            dict(self._losses.first),
        )  # fmt: skip

    def _best_fit(self) -> tuple[Streamed, ...]:
        """Each document goes into the fullest open row that it fits; with no room left the fullest row is given."""
        while True:
            document = self._draw()
            length, most, sizes = document.tokens.size, self._rules.seq_len, self._sizes
            fullest = max((size for size in sizes if size + length <= most), default=None)
            if fullest is not None:
                row = sizes.index(fullest)
                self._rows[row] = (*self._rows[row], document)
                sizes[row] += length
                if sizes[row] == most:
                    return self._given(row)
                continue
            full = self._given(sizes.index(max(sizes))) if len(sizes) == OPEN_ROWS else None
            self._rows.append((document,))
            sizes.append(length)
            if full is not None:
                return full

    def _given(self, row: int) -> tuple[Streamed, ...]:
        self._sizes.pop(row)
        return self._rows.pop(row)

    def _concat(self) -> tuple[Streamed, ...]:
        """Documents end to end, cut where the row ends; the rest begins the next row."""
        row, free = [], self._rules.seq_len
        rest = self._rows.pop()[0] if self._rows else None
        while free:
            document = rest or self._draw()
            row.append(document.cut(0, free))
            rest = document.cut(free, document.tokens.size) if document.tokens.size > free else None
            free -= row[-1].tokens.size
        if rest is not None:
            self._rows.append((rest,))
        return tuple(row)

    def _draw(self) -> Streamed:
        """A document of the buffer, chosen by a keyed hash; the next one read takes its place."""
        while len(self._buffer) < self._rules.buffer:
            self._buffer.append(self._next())
        choice = _keyed(self._rules.seed, self.number, self._draws) % len(self._buffer)
        self._draws += 1
        document, self._buffer[choice] = self._buffer[choice], self._next()
        return document

    def _next(self) -> Streamed:
        """The next document, from the source that has given least for its share."""
        while not self._waiting:
            source = min(range(len(self._feeds)), key=lambda i: (self._taken[i] / self._feeds[i].share, i))
            pieces = self._readers[source].next()
            units = int(bool(pieces)) if self._rules.by == "documents" else sum(p.tokens.size for p in pieces)
            self._taken[source] += units
            self._waiting.extend(pieces)
        return self._waiting.popleft()

    def _phases(self) -> Iterator[float]:
        """Where each source's count begins: lanes that all began with the same source would take it in turns."""
        unit = self._rules.seq_len if self._rules.by == "tokens" else OPEN_ROWS
        for i, feed in enumerate(self._feeds):
            chance = _keyed(self._rules.seed, self.number, -1 - i) / 2**64
            yield feed.share * chance * unit if len(self._feeds) > 1 else 0.0


@dataclass(slots=True)
class _Losses:
    """What one lane left out, cut or repaired, by reason, and where each befell first."""

    dropped: Counter[str]
    changed: Counter[str]
    first: dict[str, str]

    def count(self, which: Counter[str], reason: str, where: Callable[[], str]) -> None:
        which[reason] += 1
        if reason not in self.first:
            self.first[reason] = where()


@dataclass(frozen=True, slots=True)
class _Read:
    """A record that was read ahead, and where the lane goes on after it.

    example: None: left out for `reason`
    notes: what was repaired
    """

    after: Position
    file: int
    at: int
    example: Example | None
    reason: str = ""
    notes: tuple[str, ...] = ()


class _Reader:
    """One source from one lane's position on; what it has read ahead is no state, it is read again."""

    def __init__(
        self, feed: Feed, source: int, lane: int, rules: Rules, tokenise: Tokenise, losses: _Losses, position: Position
    ) -> None:
        self.position = position
        self._feed, self._source, self._lane, self._rules = feed, source, lane, rules
        self._tokenise, self._losses = tokenise, losses
        self._records = self._walk(position)
        self._ahead: deque[tuple[_Read, Group | None]] = deque()
        self._dropped_in_a_row, self._useful_epoch = 0, position.epoch

    def next(self) -> list[Streamed]:
        """The pieces of the next record; none where it is left out, which is counted."""
        if not self._ahead:
            self._read_ahead()
        read, group = self._ahead.popleft()
        self.position = read.after
        pieces = self._kept(read, group)
        if pieces:
            self._dropped_in_a_row, self._useful_epoch = 0, read.after.epoch
            return pieces
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= _MANY_DROPPED and read.after.epoch - self._useful_epoch >= 2:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in self._losses.dropped.items())
            raise UserError(f"{self._feed.name}: nothing is left to learn from ({reasons}).")
        return []

    def _kept(self, read: _Read, group: Group | None) -> list[Streamed]:
        """What of a record goes into rows, as `overlong` says."""
        rules, losses, name = self._rules, self._losses, lambda: self.place(read.file, read.at)
        for note in (*read.notes, *(group.changed if group and not group.dropped else ())):
            losses.count(losses.changed, note, name)
        if group is None or group.dropped:
            losses.count(losses.dropped, read.reason if group is None else group.dropped, name)
            return []
        (ids, weights, _), *more = group.documents
        if more:
            raise UserError(f"{name()}: {COMPARED}")
        if ids.size and int(ids.max()) >= rules.vocab_size:
            raise UserError(
                f"{name()}: holds token id {int(ids.max())}, but the model has {rules.vocab_size} ids. Use the model's "
                f"own tokenizer, or a model with a larger vocab_size."
            )
        document = Streamed(ids, weights, self._source, read.file, read.at)
        if ids.size <= rules.seq_len or rules.packing == "concat":
            return [document]
        return self._shortened(document, name)

    def _shortened(self, document: Streamed, name: Callable[[], str]) -> list[Streamed]:
        rules, losses, length = self._rules, self._losses, document.tokens.size
        if rules.overlong == "error":
            raise UserError(
                f"{name()}: {length} tokens are more than data.seq_len = {rules.seq_len}. Raise data.seq_len, or set "
                f"data.overlong to drop, truncate or split."
            )
        if rules.overlong == "drop":
            losses.count(losses.dropped, "longer than seq_len", name)
            return []
        reason = "truncated to seq_len" if rules.overlong == "truncate" else "split at seq_len"
        begins = range(0, 1 if rules.overlong == "truncate" else length, rules.seq_len)
        pieces = [document.cut(begin, begin + rules.seq_len) for begin in begins]
        if not any(np.any(piece.weights[1:]) for piece in pieces):
            losses.count(losses.dropped, f"no trained token left when {reason}", name)
            return []
        losses.count(losses.changed, reason, name)
        return pieces

    def _read_ahead(self) -> None:
        """Read and tokenise some records in one call."""
        reads = [next(self._records) for _ in range(_TOGETHER)]
        kept = [read for read in reads if read.example is not None]
        pairs = [(str(i), read.example) for i, read in enumerate(kept) if read.example is not None]
        try:
            encoded = iter(list(self._tokenise(pairs)))
        except UserError as error:  # begins with the number of its pair; finding the place may take a while
            number, _, said = str(error).partition(": ")
            if not number.isdigit():
                raise
            raise UserError(f"{self.place(kept[int(number)].file, kept[int(number)].at)}: {said}") from error
        self._ahead.extend((read, next(encoded) if read.example is not None else None) for read in reads)

    def _walk(self, position: Position) -> Iterator[_Read]:
        """This lane's records without an end, from a position on: each is read as its format says."""
        files, lanes, size = self._feed.files, self._rules.lanes, self._feed.block
        epoch, turn, at = position.epoch, position.turn, position.at
        seen_epoch = epoch
        while True:
            number = self._file(epoch, turn)
            shift = _keyed(self._rules.seed, self._source, number, epoch)
            while True:
                wait = (self._lane - at // size - shift) % lanes  # blocks until the next one that is this lane's
                at = (at // size + wait) * size if wait else at
                if (wait and size == WHOLE_FILE) or at >= files[number].extent():  # another lane's file is not opened
                    break
                end = (at // size + 1) * size
                found, after = files[number].read(at, end)
                for i, (place, record) in enumerate(found):
                    following = found[i + 1][0] if i + 1 < len(found) else after
                    seen_epoch = epoch
                    yield self._example(record, Position(epoch, turn, following), number, place)
                at = after
            epoch, turn, at = (epoch, turn + 1, 0) if turn + 1 < len(files) else (epoch + 1, 0, 0)
            if epoch - seen_epoch > _MANY_EPOCHS * lanes:
                raise UserError(f"{self._feed.name}: holds no records. Fill it, or remove the source.")

    def _example(self, record: Any, after: Position, file: int, at: int) -> _Read:
        notes: list[str] = []
        try:
            return _Read(after, file, at, self._feed.form.read(record, notes.append), notes=tuple(notes))
        except Skip as skip:
            return _Read(after, file, at, None, str(skip), tuple(notes))
        except UserError as error:
            raise UserError(f"{self.place(file, at)}: {error}") from error

    def _file(self, epoch: int, turn: int) -> int:
        """Files come in another order in every epoch."""
        files = len(self._feed.files)
        if files == 1:
            return 0
        seed = _keyed(self._rules.seed, self._source) >> 1
        return int(permute(np.array([turn], np.int64), files, seed=seed, epoch=epoch)[0])

    def place(self, file: int, at: int) -> str:
        """How messages name a record."""
        return self._feed.files[file].place(at)


def _keyed(*values: int) -> int:
    """64 bits that these numbers decide."""
    return int(xxhash.xxh3_64_intdigest(struct.pack(f"<{len(values)}q", *values)))
