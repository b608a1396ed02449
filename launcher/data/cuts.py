"""Which tokens lie between two characters of a text, proven on the token ids; says where a token reaches over a cut.

A tokenizer splits a text at its special tokens before anything else. So before a cut there are the ids up to the last
special token before it, and those of the stretch of text from there on, which is short and mostly the same: beginnings
of the text need not be encoded again. Where the special tokens among the ids are not those of the text, they are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.encode import TextEncoder

_KEPT_CHARACTERS, _KEPT_STRETCHES = 80, 10_000  # as "<|im_start|>assistant\n"

Ids = NDArray[np.uint32]


class Cutter:
    """Finds token borders under one tokenizer.

    Args:
        also: added tokens that a template writes between turns, though the tokenizer does not call them special.
    """

    def __init__(self, tokenizer: Any, encoder: TextEncoder, *, also: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._special = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or token.content in also)
        }
        words = sorted(self._special, key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self._is_special = np.zeros(max(self._special.values(), default=-1) + 1, dtype=bool)
        self._is_special[list(self._special.values())] = True
        self._kept: dict[str, Ids] = {}

    def special_in(self, text: str) -> str:
        """The first special token that is written out in a text, or nothing."""
        found = self._words.search(text)
        return found[0] if found else ""

    def borders(
        self, texts: Sequence[str], ids: Sequence[Ids], cuts: Sequence[Sequence[int]]
    ) -> list[list[int | None]]:
        """For each text, how many tokens lie before each of its cuts; None: a token reaches over the cut.

        Args:
            ids: token ids of each text.
            cuts: characters of each text.
        """
        plans = [self._plan(text, whole, at) for text, whole, at in zip(texts, ids, cuts, strict=True)]
        stretches = self._stretches({stretch for plan in plans for _, stretch in plan if stretch})
        return [
            [_count(whole, start, stretches[stretch]) if stretch else start for start, stretch in plan]
            for plan, whole in zip(plans, ids, strict=True)
        ]

    def apart(self, text: str, whole: Ids, cuts: Sequence[int]) -> tuple[Ids, list[int]] | None:
        """Ids of a text that is encoded in pieces, and how many tokens lie before each cut.

        So does a model see it that is given the text up to a cut, and writes on. None where the pieces together are
        not the same text, as with tokenizers that put a space before each.
        """
        places = sorted({0, len(text), *cuts})
        pieces = self._encode([text[a:b] for a, b in pairwise(places)])
        ids = np.concatenate(pieces) if pieces else whole
        same = self._decoded(ids) == self._decoded(whole)
        if not same or not np.array_equal(ids[self._specials(ids)], whole[self._specials(whole)]):
            return None
        before = dict(zip(places, np.cumsum([0, *(len(piece) for piece in pieces)]).tolist(), strict=True))
        return ids, [before[cut] for cut in cuts]

    def _plan(self, text: str, whole: Ids, cuts: Sequence[int]) -> list[tuple[int, str]]:
        """For each cut a number of tokens, and the text from there to the cut."""
        words = list(self._words.finditer(text))
        places = self._specials(whole)
        if [self._special[word[0]] for word in words] != whole[places].tolist():
            return [(0, text[:cut]) for cut in cuts]
        begins, plan = [word.start() for word in words], []
        for cut in cuts:
            last = bisect_right(begins, cut) - 1
            if last < 0:
                plan.append((0, text[:cut]))
            elif cut in (begins[last], words[last].end()):
                plan.append((int(places[last]) + (cut > begins[last]), ""))
            else:
                plan.append((int(places[last]), text[begins[last] : cut]))
        return plan

    def _specials(self, ids: Ids) -> NDArray[np.intp]:
        small = np.flatnonzero(ids < self._is_special.size)
        return small[self._is_special[ids[small]]]

    def _stretches(self, texts: set[str]) -> dict[str, Ids]:
        new = sorted(texts - self._kept.keys())
        found = dict(zip(new, self._encode(new), strict=True))
        result = {text: found[text] if text in found else self._kept[text] for text in texts}
        if len(self._kept) < _KEPT_STRETCHES:
            self._kept.update((text, ids) for text, ids in found.items() if len(text) <= _KEPT_CHARACTERS)
        return result

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.asarray(ids, dtype=np.uint32) for ids in self._encoder.encode(texts, special=False)]

    def _decoded(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _count(whole: Ids, start: int, stretch: Ids) -> int | None:
    end = start + len(stretch)
    return end if np.array_equal(whole[start:end], stretch) else None
