"""How texts become ids: by tiktoken where it is proven to give the tokenizer's own ids, else by the tokenizer itself.

The proof (`bpe`) takes seconds, so it is made once for a tokenizer, kept in the cache folder, and only for data that
repays it. Which encoder is taken never changes an id, and so is no part of any key.
"""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data import bpe

SAMPLES = 20_000  # texts that both encoders are given before the faster one is believed
REPAID_BYTES = 16 << 20  # of records; less than that is encoded before a proof would be found
_SAMPLE_CHARACTERS = 300
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether tiktoken stands for a tokenizer.

    proven: whether it does
    why: if it does not, the reason
    unreached, doubtful: see `bpe.Proof`
    samples: texts that were compared
    """

    proven: bool
    why: str = ""
    unreached: tuple[int, ...] = ()
    doubtful: str = ""
    samples: int = 0

    def __str__(self) -> str:
        if self.proven:
            return f"encoded by tiktoken, proven to give the tokenizer's ids ({self.samples:,} samples compared)"
        return f"encoded by tokenizers, since {self.why}"


class TextEncoder:
    """Texts to ids under one tokenizer, many in a call.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        verdict: of `judge`; without one the tokenizer encodes itself.
    """

    def __init__(self, tokenizer: Any, verdict: Verdict | None = None) -> None:
        self._tokenizer = tokenizer
        self._fast: bpe.FastEncoder | None = None
        if verdict is not None and verdict.proven:
            self._fast = bpe.FastEncoder(
                bpe.structure(tokenizer), bpe.Proof(frozenset(verdict.unreached), verdict.doubtful)
            )

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Any]:
        """Ids of each text, in order, as lists or uint32 arrays.

        Args:
            special: whether the tokenizer adds what it puts around a text, as a begin token.
        """
        if self._fast is None:
            return self._own(texts, special=special)
        found: list[Any] = list(self._fast.encode(texts, special=special))
        left = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(left, self._own([texts[i] for i in left], special=special), strict=True):
            found[i] = ids
        return found

    def _own(self, texts: Sequence[str], *, special: bool) -> list[Any]:
        if not texts:
            return []
        if self._tokenizer.is_fast:
            encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
            return [e.ids for e in encoded]
        return list(self._tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])


def judge(
    tokenizer: Any, texts: Callable[[], Iterator[str]], folder: Path, *, size: int = REPAID_BYTES
) -> Verdict | None:
    """The verdict on a tokenizer, looked up in `folder`, or found now and kept there if so many bytes repay it.

    Args:
        texts: gives texts of the data at hand, of which `SAMPLES` are compared.
    """
    if size < REPAID_BYTES and not folder.is_dir():
        return None
    if not tokenizer.is_fast:
        return Verdict(False, "the tokenizer has no fast form")
    try:
        engine = version("tiktoken")
    except PackageNotFoundError:
        return Verdict(False, "tiktoken is not installed (pip install 'train-launcher[train]')")
    versions = f"{engine} {version('tokenizers')} {unicodedata.unidata_version} {sys.version_info[:2]}"
    named = hashlib.sha256(f"{versions}\n{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()[:32]
    file = folder / f"{named}.json"
    if file.exists():
        known = json.loads(file.read_text())
        return Verdict(**{**known, "unreached": tuple(known["unreached"])})
    if size < REPAID_BYTES:
        return None
    verdict = _found(tokenizer, texts)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{named}.{id(verdict)}")
    fresh.write_text(json.dumps(asdict(verdict)))
    fresh.replace(file)
    return verdict


def _found(tokenizer: Any, texts: Callable[[], Iterator[str]]) -> Verdict:
    try:
        found = bpe.structure(tokenizer)
        proof = bpe.prove(found)
        samples = [*_synthetic(found), *(text[:_SAMPLE_CHARACTERS] for text in islice(texts(), SAMPLES))]
        _compare(tokenizer, bpe.FastEncoder(found, proof), samples)
    except bpe.NotProven as reason:
        return Verdict(False, str(reason))
    return Verdict(True, unreached=tuple(sorted(proof.unreached)), doubtful=proof.doubtful, samples=len(samples))


def _compare(tokenizer: Any, fast: bpe.FastEncoder, samples: Sequence[str]) -> None:
    own = TextEncoder(tokenizer)
    for begin in range(0, len(samples), _AT_ONCE):
        some = samples[begin : begin + _AT_ONCE]
        for special in (False, True) if begin == 0 else (False,):
            pairs = zip(some, own.encode(some, special=special), fast.encode(some, special=special), strict=True)
            for text, theirs, ours in pairs:
                if ours is not None and not np.array_equal(ours, np.array(theirs, dtype=np.uint32)):
                    raise bpe.NotProven(f"tiktoken gives other ids for {text[:80]!r}")


def _synthetic(found: bpe.Structure) -> list[str]:
    """Texts of every script, of white space, numbers and repetitions, and with added tokens among them."""
    random = np.random.default_rng(0)
    texts = ["", " ", "\n", "a" * 300, " " * 300 + "a", "\n \n" * 50, "9" * 50, "'s 'S'LL'\u017f", "e\u0301 \u00e9"]
    for begin, end in ((32, 127), (32, 0x250), (0x300, 0x1200), (0x2000, 0x3100), (0x3040, 0xD7A4), (0x1F000, 0x1FB00)):
        for _ in range(50):
            letters = random.integers(begin, end, size=60)
            letters[random.random(60) < 0.2] = 32
            texts.append("".join(map(chr, letters.tolist())))
    added = list(found.added)[:200]
    texts += [f"one{a}two {a} {b}\n{b}" for a, b in zip(added, reversed(added), strict=True)]
    return texts
