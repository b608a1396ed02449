"""How texts become ids: the tokenizer's own batch encoder, for all that is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextEncoder:
    """Texts to ids under one tokenizer, many in a call.

    Args:
        tokenizer: as `load_tokenizer` gives it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Sequence[int]]:
        """Ids of each text, in order, as lists or uint32 arrays.

        Args:
            special: whether the tokenizer adds what it puts around a text, as a begin token.
        """
        if not texts:
            return []
        if self._tokenizer.is_fast:
            encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
            return [e.ids for e in encoded]
        return list(self._tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])
