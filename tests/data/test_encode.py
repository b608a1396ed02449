"""Texts become the same ids by the faster encoder, or it is not used and the reason is told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data import bpe
from launcher.data.encode import TextEncoder, Verdict, judge

pytest.importorskip("tiktoken")
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "", "the quick brown fox", "  def add(a, b):\n\n    return a+b\n", "It's 12345 o'clock; WE'LL\t\tsee",
    "na\u00efve \u4f60\u597d \U0001f600 e\u0301", "<|im_start|>user\nhello<|im_end|>\n",
    "a<|endoftext|><|endoftext|> b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\u05e9\u05dc\u05d5\u05dd   ", "x" * 200,
]  # fmt: skip


def make(folder, *, split=None, nfc=False, begin=False, size=600, change=lambda spec: None):
    """A trained byte-level tokenizer; `change` edits its JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = bytewise
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytewise])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(
        [*TEXTS, "the then other another return returning turn", "hello hell help " * 9], trainer
    )
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
        )
    spec = json.loads(tokenizer.to_str())
    change(spec)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


@pytest.fixture
def few_characters(monkeypatch):
    """The comparison of regex engines over fewer characters, in milliseconds."""
    monkeypatch.setattr(
        bpe, "_CHARACTERS", [chr(c) for c in (*range(0x250), *range(0x300, 0x380), *range(0x1E00, 0x1F00))]
    )


def same_ids(tokenizer, verdict, *more):
    texts = [*TEXTS, *more]
    for special in (False, True):
        ours = TextEncoder(tokenizer, verdict).encode(texts, special=special)
        theirs = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=special)]
        assert [list(ids) for ids in ours] == theirs


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize(
    "form",
    [{}, {"split": LLAMA}, {"nfc": True}, {"begin": True, "split": LLAMA, "nfc": True}],
    ids=["byte level", "split", "nfc", "all"],
)
def test_a_byte_level_tokenizer_is_proven_and_gets_the_same_ids(tmp_path, form):
    tokenizer = make(tmp_path, **form)
    verdict = judge(tokenizer, lambda: iter(TEXTS), tmp_path / "encoders")
    assert verdict.proven, verdict.why
    assert "tiktoken" in str(verdict)
    same_ids(tokenizer, verdict)


def drop_merge(spec):
    """Its token is made of other pieces no more, but other merges still use it."""
    merges = spec["model"]["merges"]
    used = {part for merge in merges for part in merge}
    merges.remove(next(merge for merge in merges if "".join(merge) in used))


def reorder(spec):
    merges = spec["model"]["merges"]
    merges.append(merges.pop(0))


def whole_word(spec):
    """A word that is a token is taken whole, though its merges leave it in many pieces."""
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["zqzq"] = 5000


def all_pairs(spec):
    """As lists that are derived from tiktoken's files: a merge for each way to cut a token into two."""
    vocabulary, order = spec["model"]["vocab"], dict.fromkeys("".join(m) for m in spec["model"]["merges"])
    cuts = [[token[:i], token[i:]] for token in order for i in range(1, len(token))]
    spec["model"]["merges"] = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    spec["model"]["ignore_merges"] = True


def two_pieces(spec):
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["zq"] = 5000


def scatter(spec):
    """The first token of three letters gets another merge, at the end."""
    merges = spec["model"]["merges"]
    one = next("".join(merge) for merge in merges if len("".join(merge)) == 3)
    pairs = {tuple(merge) for merge in merges}
    merges.append(next([one[:i], one[i:]] for i in (1, 2) if (one[:i], one[i:]) not in pairs))
    spec["model"]["vocab"] |= {
        part: 6000 + i for i, part in enumerate(merges[-1]) if part not in spec["model"]["vocab"]
    }


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_any_list_of_merges_that_is_believed_gives_the_same_ids(random, ignore_merges, shuffled):
    """Merges of every kind: of parts that come later or never, several for one token, anywhere in the list."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = ["a", "b", "c"], []
    for _ in range(random.randint(1, 25)):
        pair = (random.choice(tokens), random.choice(tokens))
        if pair not in merges and len("".join(pair)) < 7:
            merges.append(pair)
            tokens.append("".join(pair))
    if shuffled:
        random.shuffle(merges)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*bpe._alphabet(), *tokens]))}
    vocabulary |= {"".join(random.choices("abc", k=5)): 900 + i for i in range(3)} if ignore_merges else {}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = bpe.structure(SimpleNamespace(is_fast=True, backend_tokenizer=backend))
    try:
        proof = bpe.Proof(bpe._unreached(found))
    except bpe.NotProven:
        return
    words = ["".join(random.choices("abc", k=random.randint(1, 40))) for _ in range(60)]
    words += [*vocabulary][256:] + ["".join(random.choices(tokens, k=3)) for _ in range(30)]
    for word, ids in zip(words, bpe.FastEncoder(found, proof).encode(words, special=False), strict=True):
        assert ids.tolist() == backend.encode(word).ids, word


def prefix(spec):
    spec["added_tokens"].append({**spec["added_tokens"][1], "content": "<|im_start|>x", "id": 5001})


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize("change", [drop_merge, reorder, whole_word, all_pairs])
def test_merges_that_lead_elsewhere_than_their_tokens_give_the_same_ids(tmp_path, change):
    tokenizer = make(tmp_path, change=change)
    verdict = judge(tokenizer, lambda: iter(TEXTS), tmp_path / "encoders")
    assert verdict.proven, verdict.why
    same_ids(tokenizer, verdict, "zqzq zqz zq qzqzq", "zqzqzqzq")


@pytest.mark.usefixtures("few_characters")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (two_pieces, "in two pieces"),
        (scatter, "at two places"),
        (prefix, "is the beginning of"),
        (lambda spec: spec["added_tokens"][0].update(lstrip=True), "takes in white space"),
        (lambda spec: spec["model"].update(dropout=1e-30), "dropout"),
        (lambda spec: spec["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "a space before"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokeniser is Whitespace"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normaliser is Lowercase"),
        (lambda spec: spec["model"]["vocab"].pop("\u0100"), "no token for 1 of 256 bytes"),
    ],
)  # fmt: skip
def test_what_is_not_proven_is_encoded_by_the_tokenizer_and_told(tmp_path, change, why):
    tokenizer = make(tmp_path, change=change)
    verdict = judge(tokenizer, lambda: iter(TEXTS), tmp_path / "encoders")
    assert not verdict.proven
    assert why in str(verdict)
    same_ids(tokenizer, verdict)


@pytest.mark.parametrize(
    "pattern", [r"\w+|\W+", r"a{1,2}+|[\s\S]", r"^a|[\s\S]", r"[[:alpha:]]+", r"(?i:straße)|\s", r"\s*"]
)
def test_patterns_that_engines_may_read_differently_are_refused(pattern):
    with pytest.raises(bpe.NotProven):
        bpe._same_pattern(pattern)


@pytest.mark.usefixtures("few_characters")
def test_the_verdict_is_kept_for_the_next_time(tmp_path):
    tokenizer = make(tmp_path)
    first = judge(tokenizer, lambda: iter(TEXTS), tmp_path / "encoders")
    assert judge(tokenizer, lambda: pytest.fail("asked for texts"), tmp_path / "encoders") == first
    assert isinstance(first, Verdict)


@pytest.mark.usefixtures("few_characters")
def test_a_sample_that_differs_overrules_the_proof(tmp_path, monkeypatch):
    tokenizer = make(tmp_path)
    right = bpe.FastEncoder.encode
    monkeypatch.setattr(bpe.FastEncoder, "encode", lambda *args, **how: [ids[:-1] for ids in right(*args, **how)])
    verdict = judge(tokenizer, lambda: iter(["other text"]), tmp_path / "encoders")
    assert not verdict.proven
    assert "gives other ids" in verdict.why


@pytest.mark.usefixtures("few_characters")
def test_what_the_faster_encoder_cannot_take_goes_to_the_tokenizer(tmp_path):
    tokenizer = make(tmp_path, nfc=True)
    fast = bpe.FastEncoder(bpe.structure(tokenizer), bpe.Proof(doubtful="q"))
    texts = ["plain", "e\u0301", " " * 2_000_000, "\u00e9q", "q"]
    taken = [ids is not None for ids in fast.encode(texts, special=False)]
    assert taken == [True, False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [bpe._GPT2, LLAMA], ids=["gpt2", "llama"])
def test_both_regex_engines_agree_on_every_character(pattern):
    bpe._same_pattern(pattern)
