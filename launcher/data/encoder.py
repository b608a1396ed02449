"""What a record becomes: token ids and weights of its documents, a hash of its words, what is dropped and changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from launcher.data.chat import MaskRule, Rendered, render, template_of
from launcher.data.cuts import Cutter
from launcher.data.encode import TextEncoder
from launcher.data.formats import Chat, Completion, Example, Format, Labelled, Pair, Skip, Text, Tokens
from launcher.data.store import Side
from launcher.data.template import Template, special_tokens
from launcher.data.tokenizer import missing_bytes
from launcher.errors import UserError

OVER = "a token reaches over the border of a trained turn"
LOST = "characters left out that the tokenizer has no token for"
EMPTIED = "an answer of characters that the tokenizer has no token for"
APART = "tokenised apart where a token would reach over the border of a turn"

Ids = NDArray[np.uint32]
Weights = NDArray[Any]  # uint8, or float32 where a weight is no whole number


@dataclass(slots=True)
class Group:
    """What one record becomes.

    documents: (ids, weights, `Side`) each; the two of a pair are chosen, then rejected
    hash: xxh3_64 of the record's text, the same under any tokenizer, template and mask
    dropped: why nothing is learnt from it, else ""
    changed: what was done to it so that it can be learnt
    """

    documents: list[tuple[Ids, Weights, int]]
    hash: int
    dropped: str = ""
    changed: list[str] = field(default_factory=list)


class Encoder:
    """Examples to token ids and weights.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        objective: sft or pretrain; pretrain trains every token.
        texts: turns texts into ids, if not the tokenizer itself.
        template: what messages call the chat template.
    """

    def __init__(
        self, tokenizer: Any, *, rule: MaskRule, objective: str, texts: TextEncoder | None = None,
        template: str = "the tokenizer's chat template",
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._missing = missing_bytes(tokenizer)
        self._template_called = template
        self._rule = MaskRule("all") if objective == "pretrain" else rule
        self._answers = replace(rule, train_on="assistant", roles=("assistant",))
        self._encoder = texts or TextEncoder(tokenizer)
        written = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._cutter = Cutter(tokenizer, self._encoder, also=special_tokens(written))
        self._template: Template | None = None

    def check(self, form: Format) -> None:
        """Refuse, before any record is read, a tokenizer that cannot serve the format.

        Raises:
            UserError: no chat template, or one that cannot be used, or no end token.
        """
        if form.conversational:
            self._chat_template()
        elif form.name in ("prompt_completion", "text"):
            self._end_token()

    def encode(self, examples: Sequence[tuple[str, Example]]) -> Iterator[Group]:
        """What each (where, example) becomes, in order; tokenised in one call.

        Raises:
            UserError: a mask cannot be proven; begins with `where`.
        """
        groups = [Group([], _hash(example)) for _, example in examples]
        jobs: list[list[_Job]] = []
        for (where, example), group in zip(examples, groups, strict=True):
            jobs.append([])
            with placed(where):
                try:
                    jobs[-1] = [self._job(part, rule, side) for part, rule, side in self._parts(example)]
                except Skip as skip:
                    group.dropped = str(skip)
            if self._missing and any(self._loses(text) for job in jobs[-1] for text in job.texts[-1:]):
                group.changed.append(LOST)
        self._fill([job for record in jobs for job in record])
        for (where, _), group, record in zip(examples, groups, jobs, strict=True):
            with placed(where):
                try:
                    group.documents += [(*self._weighted(job, group), job.side) for job in record]
                except Skip as skip:
                    group.dropped = str(skip)
            group.dropped = group.dropped or _nothing_to_learn(group.documents)
            yield group

    def _parts(self, example: Example) -> Iterator[tuple[Example, MaskRule, int]]:
        """The documents of an example, with what is trained of each: of pairs and labelled answers the answers."""
        if isinstance(example, Pair):
            if example.chosen == example.rejected:
                raise Skip("chosen and rejected are the same")
            yield _answer(example.chosen, example.rejected), self._answers, Side.chosen
            yield _answer(example.rejected, example.chosen), self._answers, Side.rejected
        elif isinstance(example, Labelled):
            rule = replace(self._answers, train_on="last_assistant")
            yield example.example, rule, Side.good if example.good else Side.bad
        else:
            yield example, self._rule, Side.plain

    def _job(self, example: Example, rule: MaskRule, side: int) -> _Job:
        if isinstance(example, Chat):
            self._refuse_injection(example)
            self._refuse_emptied(*(m["content"] for m in example.messages if m["role"] == "assistant"))
            rendered = render(example, self._chat_template(), rule)
            return _Job(example, rule, side, [rendered.text], special=False, rendered=rendered)
        if isinstance(example, Completion):
            self._end_token()
            self._refuse_emptied(example.completion)
            return _Job(example, rule, side, [example.prompt, example.prompt + example.completion])
        if isinstance(example, Text):
            self._end_token()
            return _Job(example, rule, side, [example.text] if example.text else [])
        return _Job(example, rule, side, [])

    def _refuse_injection(self, chat: Chat) -> None:
        """A special token inside of a message would end its turn, or begin another's: never learnt."""
        for message in chat.messages:
            texts = [message["content"], message.get("reasoning_content") or ""]
            texts += [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
            for text in texts:
                if token := self._cutter.special_in(text):
                    raise Skip(f"the special token {token} inside of a message")
        if chat.tools and (token := self._cutter.special_in(json.dumps(chat.tools, ensure_ascii=False))):
            raise Skip(f"the special token {token} inside of the tools")

    def _loses(self, text: str) -> bool:
        whole = text.encode("utf-8", "surrogatepass")
        return len(whole.translate(None, self._missing)) < len(whole)

    def _refuse_emptied(self, *answers: str) -> None:
        """An answer that has words, none of which the tokenizer can write, would be learnt as an empty one."""
        for answer in answers if self._missing else ():
            if answer.strip() and not answer.encode("utf-8", "surrogatepass").translate(None, self._missing).strip():
                raise Skip(EMPTIED)

    def _fill(self, jobs: Sequence[_Job]) -> None:
        """Encode the jobs' texts, and find the tokens at the borders of trained turns and at the end of prompts."""
        for special in (False, True):
            some = [job for job in jobs if job.special == special]
            ids = iter(self._encoder.encode([text for job in some for text in job.texts], special=special))
            for job in some:
                job.ids = [np.asarray(next(ids), dtype=np.uint32) for _ in job.texts]
        self._join([job for job in jobs if isinstance(job.example, Completion)])
        chats = [job for job in jobs if job.rendered is not None and job.cuts]
        borders = self._cutter.borders([j.texts[0] for j in chats], [j.ids[0] for j in chats], [j.cuts for j in chats])
        for job, found in zip(chats, borders, strict=True):
            job.borders = found

    def _weighted(self, job: _Job, group: Group) -> tuple[Ids, Weights]:
        if job.rendered is not None:
            return self._chat(job, job.rendered, group)
        if isinstance(job.example, Completion):
            return self._completion(job, job.example)
        if isinstance(job.example, Tokens):
            return np.array(job.example.ids, dtype=np.uint32), _compact(np.array(job.example.weights, dtype=np.float32))
        ids = self._ended(job.ids[0]) if job.ids and job.ids[0].size else np.zeros(0, np.uint32)
        return ids, np.ones(ids.size, dtype=np.uint8)

    def _chat(self, job: _Job, rendered: Rendered, group: Group) -> tuple[Ids, Weights]:
        group.changed += [note for note in rendered.notes if note not in group.changed]
        ids, borders = job.ids[0], job.borders
        if None in borders:
            apart = self._cutter.apart(rendered.text, ids, job.cuts)
            if apart is None:
                raise Skip(OVER)
            ids, borders = apart[0], list(apart[1])
            group.changed += [APART] if APART not in group.changed else []
        weights = np.full(ids.size, rendered.base, dtype=np.float32)
        for i, span in enumerate(rendered.spans):
            weights[borders[2 * i] : borders[2 * i + 1]] = span.weight
        return ids, _compact(weights)

    def _join(self, jobs: Sequence[_Job]) -> None:
        """Make prompts begin their texts, with the ids of the prompt alone: a model that writes is given these."""
        for job in jobs:
            job.ids = [self._unended(ids) for ids in job.ids]
        merged = [job for job in jobs if not np.array_equal(job.ids[1][: job.ids[0].size], job.ids[0])]
        rests = self._encoder.encode([job.texts[1][len(job.texts[0]) :] for job in merged], special=False)
        for job, rest in zip(merged, rests, strict=True):
            job.ids[1] = np.concatenate([job.ids[0], np.asarray(rest, dtype=np.uint32)])

    def _completion(self, job: _Job, example: Completion) -> tuple[Ids, Weights]:
        prompt, whole = job.ids
        ids = self._ended(whole)
        weights = np.ones(ids.size, dtype=np.uint8)
        weights[: 0 if job.rule.train_on == "all" else prompt.size] = 0
        if not job.rule.end_of_turn:
            weights[whole.size :] = 0
        if not example.completion:
            weights[:] = 0
        return ids, weights

    def _chat_template(self) -> Template:
        if self._template is None:
            self._template = template_of(self._tokenizer, self._template_called)
        return self._template

    def _end_token(self) -> int:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise UserError(
                "the tokenizer has no end token, which is put after every document that is no conversation. Set "
                "eos_token in its tokenizer_config.json."
            )
        return int(end)

    def _ended(self, ids: Ids) -> Ids:
        end = self._end_token()
        return ids if ids.size and ids[-1] == end else np.append(ids, np.uint32(end))

    def _unended(self, ids: Ids) -> Ids:
        """Without the end token that some tokenizers add by themselves."""
        return ids[:-1] if ids.size and ids[-1] == self._tokenizer.eos_token_id else ids


@dataclass(slots=True)
class _Job:
    """One document on its way: `texts` become `ids`, in the same order."""

    example: Example
    rule: MaskRule
    side: int
    texts: list[str]
    special: bool = True  # whether the tokenizer adds its begin token
    rendered: Rendered | None = None
    ids: list[Ids] = field(default_factory=list)
    borders: list[int | None] = field(default_factory=list)

    @property
    def cuts(self) -> list[int]:
        return [at for span in (self.rendered.spans if self.rendered else []) for at in (span.begin, span.end)]


def _answer(one: Chat | Completion, other: Chat | Completion) -> Chat | Completion:
    """One of two answers; of the turns that both have before nothing is trained."""
    if not (isinstance(one, Chat) and isinstance(other, Chat)):
        return one
    same = 0
    while same < min(len(one.messages), len(other.messages)) - 1 and one.messages[same] == other.messages[same]:
        same += 1
    shared = [{k: v for k, v in m.items() if k != "weight"} | {"train": False} for m in one.messages[:same]]
    return Chat([*shared, *one.messages[same:]], one.tools)


def _compact(weights: NDArray[np.float32]) -> Weights:
    whole = weights.astype(np.uint8) if weights.size == 0 or weights.max() < 256 else weights
    return whole if np.array_equal(whole, weights) else weights


def _nothing_to_learn(documents: Sequence[tuple[Ids, Weights, int]]) -> str:
    if any(ids.size == 0 for ids, _, _ in documents):
        return "empty"
    return "" if all(np.any(weights[1:]) for _, weights, _ in documents) else "no trained token"


def _hash(example: Example) -> int:
    """Of the record's own text: roles, words, calls and tools, whatever is trained of it and however it is written."""
    return int(xxhash.xxh3_64_intdigest(_content(example)))


def _content(example: Example) -> bytes:
    if isinstance(example, Text):
        return example.text.encode("utf-8", "surrogatepass")
    if isinstance(example, Completion):
        return f"{example.prompt}\x1e{example.completion}".encode("utf-8", "surrogatepass")
    if isinstance(example, Tokens):
        return np.array(example.ids, dtype=np.uint32).tobytes()
    if isinstance(example, Pair):
        return _content(example.chosen) + b"\x1d" + _content(example.rejected)
    if isinstance(example, Labelled):
        return _content(example.example) + (b"\x1d+" if example.good else b"\x1d-")
    texts = [_plain(message) for message in example.messages]
    if example.tools:
        texts.append(json.dumps(example.tools, sort_keys=True))
    return "\x1e".join(texts).encode("utf-8", "surrogatepass")


def _plain(message: dict[str, Any]) -> str:
    text = f"{message['role']}\x1f{message['content']}"
    if reasoning := message.get("reasoning_content"):
        text += f"\x1f{reasoning}"
    if calls := message.get("tool_calls"):
        text += f"\x1f{json.dumps([call['function'] for call in calls], sort_keys=True)}"
    return text


class placed:
    """Put file and record before the message of a UserError."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self._where}: {error}") from error
