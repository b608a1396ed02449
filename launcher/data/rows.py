"""From tokenised parts to rows: what is held out, cut or dropped, and which documents share a row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import keyed_order, uniform_hash
from launcher.data.packing import Packing, end_to_end, one_a_row, repack
from launcher.data.sources import place
from launcher.data.store import Index, Side, count_targets, open_part
from launcher.errors import UserError
from launcher.recipe.schema import Data, Recipe


class Held(Enum):
    """Which share of the records: all, those not held out for evaluation, or those held out."""

    all = "all"
    rest = "rest"
    held = "held"


@dataclass(slots=True)
class Rows:
    """What a store is written from, with what was lost on the way, by reason.

    packings: as many as were asked for, with as many rows in each
    dropped: documents left out; changed: documents cut; a pair counts as one
    first: reason -> the first file and record it befell
    """

    index: Index
    packings: list[Packing]
    dropped: Counter[str]
    changed: Counter[str]
    first: dict[str, str]

    @property
    def empty(self) -> bool:
        return self.packings[0][0].size < 2


def build_rows(
    parts: list[list[Path]], names: list[list[str]], *, held: Held, recipe: Recipe, repack: int = 1
) -> Rows:  # fmt: skip
    """Gather the documents of all sources and lay them into rows.

    Args:
        parts: each source's part folders.
        names: each source's file names.
        repack: how many different packings to make.
    Raises:
        UserError: a document is longer than data.seq_len under `overlong: error`, or would be cut and cannot be; names
            file and record.
    """
    folders = [part for source in parts for part in source]
    losses = _Losses([name for source in names for name in source])
    index = Index.gather(folders, _first_files(parts, names))
    if held != Held.all:
        out = held_out(index.hash, seed=recipe.train.seed, fraction=recipe.data.eval_fraction)
        index = index.take(out if held == Held.held else ~out)
    if recipe.data.packing == "concat":
        index, packing = _end_to_end(index, folders, losses, recipe.data)
        packings = [packing]
    else:
        index = _fit(index, folders, losses, recipe.data, one_packing=repack == 1)
        packings = _whole_documents(index, recipe.data, times=repack, seed=recipe.train.seed)
        packings = [_without_idle_rows(index, packings[0], losses), *packings[1:]]
    return Rows(index, packings, losses.dropped, losses.changed, losses.first)


def held_out(hashes: NDArray[np.uint64], *, seed: int, fraction: float) -> NDArray[np.bool_]:
    """Which documents are for evaluation, by the hash of their record alone; at least one where two records differ.

    So a record stays on its side when others come, go or move, and all copies of it are on the same side.
    """
    chance = uniform_hash(seed, hashes.view(np.int64))
    if not hashes.size or hashes.min() == hashes.max():
        return chance < fraction
    return (chance < fraction) | (chance == chance.min())


@dataclass(slots=True)
class _Losses:
    names: list[str]
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, which: Counter[str], reason: str, index: Index) -> None:
        """Count these documents, a pair as one."""
        if count := int(np.count_nonzero(index.side != Side.rejected)):
            which[reason] += count
            self.first.setdefault(reason, _where(index, self.names))


def _first_files(parts: list[list[Path]], names: list[list[str]]) -> list[int]:
    """For each part, the number of its source's first file over all sources."""
    before = np.cumsum([0, *(len(source) for source in names)]).tolist()
    return [first for first, source in zip(before, parts, strict=False) for _ in source]


def _units(index: Index) -> NDArray[np.int64]:
    """Where each unit of packing begins: a document, or the two of a pair."""
    return np.flatnonzero(index.side != Side.rejected)


def _per_unit(values: NDArray[Any], units: NDArray[np.int64], function: np.ufunc = np.add) -> NDArray[np.int64]:
    result: NDArray[np.int64] = values[:0].astype(np.int64)
    return function.reduceat(values, units, dtype=np.int64) if units.size else result


def _whole_documents(index: Index, data: Data, *, times: int, seed: int) -> list[Packing]:
    """Rows of whole documents; the two of a pair are laid as one."""
    units = _units(index)
    if data.packing == "none":
        packings = [one_a_row(units.size)]
    else:
        packings = repack(_per_unit(index.length, units), data.seq_len, times=times, seed=seed)
    return [_of_documents(packing, units, index.length.size) for packing in packings]


def _of_documents(packing: Packing, units: NDArray[np.int64], documents: int) -> Packing:
    """A packing of units as one of the documents in them."""
    if units.size == documents:
        return packing
    offsets, order = packing
    sizes = np.diff(units, append=documents)[order]
    ends = np.cumsum(sizes)
    laid = np.repeat(units[order] - (ends - sizes), sizes) + np.arange(documents)
    return np.append(0, ends)[offsets], laid


def _end_to_end(index: Index, folders: list[Path], losses: _Losses, data: Data) -> tuple[Index, Packing]:
    """Documents one after the other, in an order that their contents fix, cut at the end of each row."""
    if (whole := index.side != Side.plain).any():
        raise UserError(
            f"data.packing = concat: {_where(index.take(whole), losses.names)} is a pair or a labelled answer, which "
            "must stay whole: expected best_fit or none."
        )
    laid = end_to_end(index.length, data.seq_len, keyed_order(index.hash))
    cut = index.length[laid.document] != laid.length
    pieces = _slices(index, laid.document, laid.start, laid.length, cut, folders)
    packing = laid.offsets, np.arange(laid.length.size)
    return (pieces, _without_idle_rows(pieces, packing, losses)) if data.isolate else (pieces, packing)


def _without_idle_rows(index: Index, packing: Packing, losses: _Losses) -> Packing:
    """Leave out rows of which nothing is trained, as those of a long prompt."""
    offsets, order = packing
    taught = _per_unit(index.trained[order], offsets[:-1]) > 0
    if taught.all():
        return packing
    kept = np.repeat(taught, np.diff(offsets))
    losses.count(losses.dropped, "no trained token in their row", index.take(order[~kept]))
    return np.append(0, np.cumsum(np.diff(offsets)[taught])), order[kept]


def _fit(index: Index, folders: list[Path], losses: _Losses, data: Data, *, one_packing: bool) -> Index:
    """Documents, and pairs, of at most `seq_len` tokens, as `overlong` says, without those that then teach nothing.

    Of a split document every piece is kept, and rows that teach nothing are left out later; where there are several
    packings, which have as many rows, the pieces that teach nothing are left out here.
    """
    seq_len, overlong, units = data.seq_len, data.overlong, _units(index)
    long = _per_unit(index.length, units) > seq_len
    if not long.any():
        return index
    sizes = np.diff(units, append=index.length.size)
    of_long = np.repeat(long, sizes)
    if overlong == "error":
        _refuse(index.take(units[long]), _per_unit(index.length, units)[long], seq_len, losses.names)
    if overlong == "drop":
        losses.count(losses.dropped, "longer than seq_len", index.take(of_long))
        return index.take(~of_long)
    if overlong == "truncate":
        origin = np.arange(index.length.size)
        cut = _truncated(index, units, of_long, folders, seq_len=seq_len)
    else:
        cut, origin = _split(index, of_long, folders, losses, seq_len=seq_len)
    if overlong == "split" and one_packing:
        units = np.flatnonzero(cut.whole())
        taught = _per_unit(cut.trained, units) > 0
    else:
        units = _units(cut)
        taught = _per_unit(cut.trained, units, np.minimum) > 0
    taught = np.repeat(taught, np.diff(units, append=cut.length.size))
    if overlong == "truncate" and (same := taught & _same(cut, of_long, folders)).any():
        losses.count(losses.dropped, "chosen and rejected are the same when truncated to seq_len", cut.take(same))
        index, cut, of_long = index.take(~same), cut.take(~same), of_long[~same]
        taught, origin = taught[~same], np.arange(index.length.size)
    lives = np.zeros(index.length.size, dtype=bool)
    lives[origin[taught]] = True
    reason = "truncated to seq_len" if overlong == "truncate" else "split at seq_len"
    losses.count(losses.changed, reason, index.take(of_long & lives))
    losses.count(losses.dropped, f"no trained token left when {reason}", index.take(~lives))
    losses.count(losses.changed, "a piece without trained tokens left out", cut.take(~taught & lives[origin]))
    return cut.take(taught)


def _same(cut: Index, of_long: NDArray[np.bool_], folders: list[Path]) -> NDArray[np.bool_]:
    """Which documents are of a truncated pair whose two sides are now the same."""
    same = np.zeros(cut.length.size, dtype=bool)
    tokens: dict[int, NDArray[Any]] = {}
    for i in np.flatnonzero(of_long & (cut.side == Side.chosen)).tolist():
        number = int(cut.part[i])
        if number not in tokens:
            tokens[number] = open_part(folders[number])["tokens"]
        one, other = (tokens[number][cut.start[j] : cut.start[j] + cut.length[j]] for j in (i, i + 1))
        same[i : i + 2] = np.array_equal(one, other)
    return same


def _truncated(
    index: Index, units: NDArray[np.int64], of_long: NDArray[np.bool_], folders: list[Path], *, seq_len: int
) -> Index:
    """The beginnings of long documents; of a pair the longer is cut, and both to one length if that is not enough."""
    shorter = np.repeat(_per_unit(index.length, units, np.minimum), np.diff(units, append=index.length.size))
    paired = np.isin(index.side, (Side.chosen, Side.rejected))
    room = np.where(paired, np.maximum(seq_len - shorter, seq_len // 2), seq_len)
    length = np.where(of_long, np.minimum(index.length, room), index.length)
    every = np.arange(index.length.size)
    return _slices(index, every, np.zeros_like(every), length, length != index.length, folders)


def _split(
    index: Index, of_long: NDArray[np.bool_], folders: list[Path], losses: _Losses, *, seq_len: int
) -> tuple[Index, NDArray[np.int64]]:
    """Long documents in pieces of `seq_len` tokens, and which document each is of.

    A last piece of a single token takes one from the piece before.
    """
    if (whole := of_long & (index.side != Side.plain)).any():
        raise UserError(
            f"data.overlong = split: {_where(index.take(whole), losses.names)} is a pair or a labelled answer of more "
            f"than data.seq_len = {seq_len} tokens, which must stay whole. Raise data.seq_len, or set data.overlong to "
            "drop or truncate."
        )
    pieces = -(-index.length // seq_len)
    origin = np.repeat(np.arange(pieces.size), pieces)
    number = np.arange(origin.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = number * seq_len
    if seq_len > 2:
        start -= (number > 0) & (index.length[origin] - start == 1)
    last = number == pieces[origin] - 1
    end = np.where(last, index.length[origin], np.append(start[1:], 0))
    return _slices(index, origin, start, end - start, of_long[origin], folders), origin


def _slices(
    index: Index, document: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64],
    cut: NDArray[np.bool_], folders: list[Path],
) -> Index:  # fmt: skip
    """Pieces of documents, with the targets of those that are `cut` counted anew."""
    result = index.take(document)
    result.start = result.start + start
    result.length = length.astype(np.int32)
    for part in np.unique(result.part[cut]).tolist():
        here = np.flatnonzero(cut & (result.part == part))
        weights = open_part(folders[part])["weights"]
        targets = count_targets(weights, result.start[here], result.length[here])
        result.trained[here], result.weight[here], result.first[here] = targets.trained, targets.weight, targets.first
    return result


def _where(index: Index, names: list[str]) -> str:
    return place(names[int(index.file[0])], int(index.record[0]))


def _refuse(long: Index, lengths: NDArray[Any], seq_len: int, names: list[str]) -> None:
    shown = [
        f"  {place(names[int(file)], int(record))}: {length} tokens"
        for file, record, length in zip(long.file[:5], long.record[:5], lengths[:5], strict=True)
    ]
    more = [f"  and {lengths.size - 5} more"] if lengths.size > 5 else []
    ways = "drop or truncate" if np.any(long.side != Side.plain) else "drop, truncate or split"
    raise UserError(
        "\n".join(
            [
                f"data.seq_len = {seq_len}: {lengths.size} records are longer, the longest has "
                f"{int(lengths.max())} tokens. Raise data.seq_len, or set data.overlong to {ways}.",
                *shown,
                *more,
            ]
        )
    )
