"""From records to a part: what a process needs to tokenise the shards of one source, and how it does one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from launcher.data.chat import MaskRule
from launcher.data.encode import TextEncoder, Verdict
from launcher.data.encoder import Encoder, placed
from launcher.data.formats import Format, Skip
from launcher.data.sources import place, record_number, records
from launcher.data.store import Encoded, write_part
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer

_BATCH = 256  # records that are tokenised in one call


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows begin:end of one table of a source, tokenised into `path`."""

    path: Path
    file: int
    begin: int
    end: int


@dataclass(slots=True)
class ShardContext:
    """What a process needs to tokenise any shard of one source; made once in each process from picklable parts.

    tables: one `datasets.Dataset` a file
    names: how each is called in messages
    verdict: whether tiktoken encodes
    """

    spec: TokenizerSpec
    form: Format
    tables: list[Any]
    names: list[str]
    rule: MaskRule
    objective: str
    verdict: Verdict | None = None
    _tokenizer: Any = field(default=None)
    _encoder: Encoder | None = field(default=None)
    _vocab_size: int = field(default=0)

    def tokenizer(self) -> Any:
        """Loaded on first use, once a process."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec)
        return self._tokenizer

    def encoder(self) -> Encoder:
        """Made on first use, once a process: it remembers what it proved about the chat template."""
        if self._encoder is None:
            texts = TextEncoder(self.tokenizer(), self.verdict)
            self._encoder = self._new_encoder(texts)
        return self._encoder

    def vocab_size(self) -> int:
        """Largest id + 1; counted once a process."""
        if self._vocab_size == 0:
            self._vocab_size = max(self.tokenizer().get_vocab().values()) + 1
        return self._vocab_size

    def check(self) -> None:
        """Refuse a tokenizer that cannot serve the source's format, before any record is read."""
        self._new_encoder().check(self.form)

    def _new_encoder(self, texts: TextEncoder | None = None) -> Encoder:
        called = self.spec.template_called
        return Encoder(self.tokenizer(), rule=self.rule, objective=self.objective, texts=texts, template=called)

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.spec, self.form, self.tables, self.names, self.rule, self.objective, self.verdict)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.spec, self.form, self.tables, self.names, self.rule, self.objective, self.verdict = state
        self._tokenizer, self._encoder, self._vocab_size = None, None, 0


def tokenise_shard(context: ShardContext, shard: Shard) -> int:
    """Write one part; returns its documents. Documents of which nothing is learnt are left out and counted by reason.

    Raises:
        UserError: a record that cannot be read or whose mask cannot be proven; names file and record.
    """
    name = context.names[shard.file]
    encoder = context.encoder()
    table, documents = context.tables[shard.file], Encoded()
    lost = {"dropped": _Reasons(shard.file), "changed": _Reasons(shard.file)}
    largest: tuple[int, list[int]] = (0, [shard.file, shard.begin])
    for begin in range(shard.begin, shard.end, _BATCH):
        batch = records(table, begin, min(begin + _BATCH, shard.end), name)
        numbers, examples = [], []
        for row, record in enumerate(batch, begin):
            number = record_number(table, row)
            with placed(place(name, number)):
                try:
                    example = context.form.read(record, partial(lost["changed"].add, number))
                except Skip as skip:
                    lost["dropped"].add(number, str(skip))
                    continue
            numbers.append(number)
            examples.append((place(name, number), example))
        for number, group in zip(numbers, encoder.encode(examples), strict=True):
            if group.dropped:
                lost["dropped"].add(number, group.dropped)
                continue
            for reason in group.changed:
                lost["changed"].add(number, reason)
            for ids, weights, side in group.documents:
                largest = max(largest, (int(ids.max()), [shard.file, number]), key=lambda found: found[0])
                documents.add(ids, weights, file=shard.file, record=number, side=side, hash=group.hash)
    meta: dict[str, Any] = {"documents": len(documents.tokens), "largest_id": largest[0], "largest_at": largest[1]}
    for what, reasons in lost.items():
        meta |= {what: reasons.counts, f"first_{what}": reasons.first}
    write_part(shard.path, documents, vocab_size=max(context.vocab_size(), largest[0] + 1), meta=meta)
    return len(documents.tokens)


class _Reasons:
    """How many records each reason met, and the first of them as [file, record]."""

    def __init__(self, file: int) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[int]] = {}
        self._file = file

    def add(self, record: int, reason: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, [self._file, record])
