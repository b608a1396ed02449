"""From records to token ids and weights: encodes examples, and turns one shard of a source into a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.chat import Rendered, render, template_of
from launcher.data.formats import Chat, Completion, Example, Format, Text
from launcher.data.sources import place, records
from launcher.data.store import Encoded, write_part
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.errors import UserError

_BATCH = 256  # records that are tokenised in one call


class Encoder:
    """Examples to token ids and weights.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        train_on: assistant, last_assistant or all.
        objective: sft or pretrain; pretrain trains every token.
    """

    def __init__(self, tokenizer: Any, *, train_on: str, objective: str) -> None:
        self._tokenizer = tokenizer
        self._train_on = "all" if objective == "pretrain" else train_on
        self._train_prompts = self._train_on == "all"

    def check(self, form: Format) -> None:
        """Refuse, before any record is read, a tokenizer that cannot serve the format.

        Raises:
            UserError: no chat template, or no end token.
        """
        if form.name in ("messages", "sharegpt", "alpaca"):
            template_of(self._tokenizer)
        elif self._tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer has no end token, which format {form.name} puts after every document. Set eos_token in "
                f"its tokenizer_config.json."
            )

    def encode(self, examples: Sequence[tuple[str, Example]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (uint32) and weights (uint8) of each (where, example), in order; tokenised in one call.

        Raises:
            UserError: a mask cannot be proven; begins with `where`.
        """
        jobs = [self._texts(where, example) for where, example in examples]
        plain = self._ids([text for texts, special, _ in jobs if not special for text in texts], special=False)
        begun = self._ids([text for texts, special, _ in jobs if special for text in texts], special=True)
        at = {False: 0, True: 0}
        for (where, example), (texts, special, rendered) in zip(examples, jobs, strict=True):
            ids = (begun if special else plain)[at[special] : at[special] + len(texts)]
            at[special] += len(texts)
            if rendered is not None:
                with _placed(where):
                    tokens, weights = ids[0], rendered.mask(ids)
            elif isinstance(example, Completion):
                tokens, weights = self._completion(example, ids)
            else:
                tokens = self._ended(ids[0]) if ids[0] else []
                weights = np.ones(len(tokens), dtype=np.uint8)
            yield np.array(tokens, dtype=np.uint32), weights

    def _texts(self, where: str, example: Example) -> tuple[list[str], bool, Rendered | None]:
        """What to tokenise for an example, and whether the tokenizer adds its begin token."""
        if isinstance(example, Chat):
            with _placed(where):
                rendered = render(example.messages, template_of(self._tokenizer), train_on=self._train_on)
            return rendered.texts(), False, rendered
        if isinstance(example, Text):
            return [example.text] if example.text else [""], bool(example.text), None
        return [example.prompt, example.prompt + example.completion], True, None

    def _completion(self, example: Completion, ids: list[list[int]]) -> tuple[list[int], np.ndarray]:
        """The prompt's ids are those of the prompt alone, because that is what the model is given when it writes."""
        prompt, whole = (self._unended(i) for i in ids)
        if whole[: len(prompt)] != prompt:
            whole = prompt + self._ids([example.completion], special=False)[0]
        tokens = self._ended(whole)
        weights = np.ones(len(tokens), dtype=np.uint8)
        weights[: 0 if self._train_prompts else len(prompt)] = 0
        if not example.completion:
            weights[:] = 0
        return tokens, weights

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer.is_fast:
            encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
            return [e.ids for e in encoded]
        return list(self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _unended(self, ids: list[int]) -> list[int]:
        """Without the end token that some tokenizers add by themselves."""
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids


class _placed:
    """Put file and record before the message of a UserError."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self._where}: {error}") from error


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
    """

    spec: TokenizerSpec
    form: Format
    tables: list[Any]
    names: list[str]
    train_on: str
    objective: str
    _tokenizer: Any = field(default=None)
    _vocab_size: int = field(default=0)

    def tokenizer(self) -> Any:
        """Loaded on first use, once a process."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec)
        return self._tokenizer

    def vocab_size(self) -> int:
        """Largest id + 1; counted once a process."""
        if self._vocab_size == 0:
            self._vocab_size = max(self.tokenizer().get_vocab().values()) + 1
        return self._vocab_size

    def check(self) -> None:
        """Refuse a tokenizer that cannot serve the source's format, before any record is read."""
        Encoder(self.tokenizer(), train_on=self.train_on, objective=self.objective).check(self.form)

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.spec, self.form, self.tables, self.names, self.train_on, self.objective)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.spec, self.form, self.tables, self.names, self.train_on, self.objective = state
        self._tokenizer, self._vocab_size = None, 0


def tokenise_shard(context: ShardContext, shard: Shard) -> int:
    """Write one part; returns its documents. Documents of which nothing is learnt are left out and counted by reason.

    Raises:
        UserError: a record that cannot be read or whose mask cannot be proven; names file and record.
    """
    tokenizer, name = context.tokenizer(), context.names[shard.file]
    encoder = Encoder(tokenizer, train_on=context.train_on, objective=context.objective)
    table, documents = context.tables[shard.file], Encoded()
    dropped: Counter[str] = Counter()
    first: dict[str, list[int]] = {}
    largest = 0
    for begin in range(shard.begin, shard.end, _BATCH):
        batch = records(table, begin, min(begin + _BATCH, shard.end), name)
        examples = []
        for i, record in enumerate(batch):
            with _placed(place(name, begin + i)):
                examples.append((place(name, begin + i), context.form.read(record)))
        for i, (ids, weights) in enumerate(encoder.encode(examples)):
            if reason := _nothing_to_learn(ids, weights):
                dropped[reason] += 1
                first.setdefault(reason, [shard.file, begin + i])
                continue
            largest = max(largest, int(ids.max()))
            documents.add(ids, weights, file=shard.file, record=begin + i)
    meta = {"documents": len(documents.tokens), "dropped": dropped, "first_dropped": first, "largest_id": largest}
    write_part(shard.path, documents, vocab_size=context.vocab_size(), meta=meta)
    return len(documents.tokens)


def _nothing_to_learn(ids: np.ndarray, weights: np.ndarray) -> str:
    if ids.size == 0:
        return "empty"
    return "" if np.any(weights[1:]) else "no trained token"
