"""Token borders at cuts, on tokenizers that treat special tokens and spaces in different ways."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launcher.data.cuts import Cutter
from launcher.data.encode import TextEncoder

CORPUS = ["The quick brown fox jumps over the lazy dog.", "assistant user\n\n words and\nanswers </a>"] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre_tokenizers.ByteLevel.alphabet()


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer, ["▁"]


def prepended():
    """As Llama 2: a normalizer puts a space before each piece of text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer, ["▁"]


def rstripping():
    """As Phi 3: a special token takes the white space that follows it."""
    return byte_level()


KINDS = {
    "byte level": byte_level,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "prepended": prepended,
    "rstripping": rstripping,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    plain, alphabet = KINDS[request.param]()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=alphabet, special_tokens=["<unk>"], limit_alphabet=400
    )
    plain.train_from_iterator(CORPUS, trainer)
    strips = request.param == "rstripping"
    plain.add_special_tokens([AddedToken(token, rstrip=strips, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")


TEXTS = [
    "<s><|im_start|>user\nThe fox <s>jumps<|im_end|>\n<|im_start|>assistant\nwords and answers<|im_end|>\n",
    "<s> user\n\nThe fox</s> assistant\n  words</s>",
    "no special token: The quick\n\nbrown fox",
    "",
]


def test_borders_are_those_of_encoded_beginnings_at_every_character(tokenizer):
    cutter = Cutter(tokenizer, TextEncoder(tokenizer))
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32) for text in TEXTS]
    places = [list(range(len(text) + 1)) for text in TEXTS]
    for text, whole, found in zip(TEXTS, ids, cutter.borders(TEXTS, ids, places), strict=True):
        for cut, count in enumerate(found):
            beginning = tokenizer.encode(text[:cut], add_special_tokens=False)
            if count is None:
                assert whole[: len(beginning)].tolist() != beginning or _splits(text, cut)
            elif not _stripped(text, cut):
                assert whole[:count].tolist() == beginning


def _splits(text, cut):
    """Whether a cut lies inside of a special token."""
    return any(text.startswith(t, cut - i) for t in SPECIAL for i in range(1, len(t)) if cut >= i)


def _stripped(text, cut):
    """Whether a special token may take the white space around a cut."""
    return cut < len(text) and text[cut].isspace() and any(text[:cut].endswith(t) for t in SPECIAL)


def test_pieces_are_encoded_apart_only_where_they_are_the_same_text(tokenizer):
    cutter = Cutter(tokenizer, TextEncoder(tokenizer))
    text = "<|im_start|>assistant\n\n\nwords<|im_end|>"
    whole = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32)
    cut = text.index("\n") + 1
    apart = cutter.apart(text, whole, [cut, len(text)])
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel) and "\n" in tokenizer.decode(whole.tolist()):
        assert apart is not None
        ids, (begin, end) = apart
        assert end == ids.size
        assert tokenizer.decode(ids[begin:].tolist()) == "\n\nwords<|im_end|>"
    inside = cutter.apart(text, whole, [3])
    assert inside is None  # a special token would be cut


def test_special_tokens_in_a_text_are_found(tokenizer):
    cutter = Cutter(tokenizer, TextEncoder(tokenizer))
    assert cutter.special_in("a <s> b") == "<s>"
    assert cutter.special_in("a < s> b") == ""
