"""Whether tiktoken gives a tokenizer's ids, proven from its structure, and the encoder that is made of it then.

Why each condition is asked for, and why together they suffice: docs/decisions/faster-encoder-is-proven.md.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# the pattern that ByteLevel of tokenizers has built in: GPT-2's
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# what may stand in a pattern: constructs that mean the same in Oniguruma and in Rust's fancy-regex
_ATOM = r"\\[pP]\{\w+\}|\\[sSdD]"
_ESCAPED = r"\\[rnt]|\\[^\w\s]"
_CONSTRUCTS = re.compile(
    rf"""(?:{_ATOM}|{_ESCAPED}
    |\[\^?(?:{_ATOM}|{_ESCAPED}|(?!--|~~|&&)[^\\\[\]])+\]  # a set of characters
    |\(\?i:['a-zA-Z|]+\)                                   # letters of both cases
    |\(\?:|\(\?[!=]|\((?!\?)|\)|\|                         # groups, looking ahead, alternatives
    |[*+?][+?]?|\{{\d+(?:,\d*)?\}}(?![+?])                 # how often; greedy, lazy or possessive
    |[^\\\[\](){{}}|*+?.^$]                                # a character by itself
    )*""",
    re.VERBOSE,
)
_FOLDED = re.compile(r"\(\?i:['a-zA-Z|]+\)")
_AT_ONCE = 1 << 14
_NONE = np.zeros(0, dtype=np.uint32)
_PROBES = ("a b", "x", " 1", "")
# all that are assigned, and the private ones nearest to them
_CHARACTERS = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))]


class NotProven(Exception):
    """The ids are not shown to be the same; the text says why."""


@dataclass(frozen=True, slots=True)
class Structure:
    """A byte-level BPE tokenizer, taken apart.

    pattern: how a text is cut into words
    made: tokens that merges make, by the place of the first such merge, behind the 256 bytes
    scattered: of them, those that are made at several places of the order
    whole: tokens that no merge makes, but that a word may be (`ignore_merges`)
    ignore_merges: whether a word that is a token is taken whole
    added: text of an added token -> its id
    nfc: whether text is brought to Unicode's form NFC first
    before, after: ids that the tokenizer puts around a text when asked for special tokens
    vocabulary, merges: as the tokenizer writes them
    """

    pattern: str
    made: list[str]
    scattered: set[str]
    whole: list[str]
    ignore_merges: bool
    added: dict[str, int]
    nfc: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    vocabulary: dict[str, int]
    merges: list[Any]


@dataclass(frozen=True, slots=True)
class Proof:
    """What has to be known of a tokenizer to encode as it does.

    unreached: ids of tokens to which the merges never lead
    doubtful: characters with which a text is not for tiktoken, as they are normalised differently
    """

    unreached: frozenset[int] = frozenset()
    doubtful: str = ""


def structure(tokenizer: Any) -> Structure:
    """Read a tokenizer's structure, and check all of it that is checked without encoding.

    Args:
        tokenizer: of transformers, fast.
    Raises:
        NotProven: it is none that tiktoken could stand for.
    """
    if not tokenizer.is_fast:
        raise NotProven("it has no fast form")
    backend = tokenizer.backend_tokenizer
    if getattr(backend, "encode_special_tokens", False):
        raise NotProven("it splits special tokens found in texts")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise NotProven(f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise NotProven(f"its model has {key}")
    pattern = _pattern(spec["pre_tokenizer"])
    added = _added(spec["added_tokens"], normalised=spec["normalizer"] is not None)
    made, scattered = _made(model)
    before, after = _around(backend)
    ignore_merges = bool(model.get("ignore_merges"))
    others = model["vocab"].keys() - set(made) - added.keys() if ignore_merges else set()
    whole = sorted(token for token in others if set(token) <= _alphabet().keys())
    return Structure(
        pattern=pattern, made=made, scattered=scattered, whole=whole, ignore_merges=ignore_merges, added=added,
        nfc=_is_nfc(spec["normalizer"]), before=before, after=after, vocabulary=model["vocab"], merges=model["merges"],
    )  # fmt: skip


def prove(found: Structure) -> Proof:
    """Check what takes seconds: where the merges lead, and that both regex engines read the pattern alike.

    Raises:
        NotProven: tiktoken could give other ids.
    """
    unreached = _unreached(found)
    _same_pattern(found.pattern)
    return Proof(unreached, "".join(sorted(_doubtful())) if found.nfc else "")


class FastEncoder:
    """tiktoken under a tokenizer's structure. Texts that it cannot take are for the tokenizer itself.

    Args:
        proof: of `prove`.
    """

    def __init__(self, found: Structure, proof: Proof) -> None:
        import tiktoken

        tokens = _ranked(found, proof)
        ranks = {_bytes(token): rank for rank, token in enumerate(tokens)}
        special = {text: len(ranks) + i for i, text in enumerate(found.added)}
        encoding = tiktoken.Encoding(
            "proven", pat_str=_total(found.pattern), mergeable_ranks=ranks, special_tokens=special
        )
        self._encode = encoding._core_bpe.encode_to_tiktoken_buffer  # encode_to_numpy looks for special tokens twice
        ids = [*(found.vocabulary[token] for token in tokens), *found.added.values()]
        self._ids = np.array(ids, dtype=np.uint32)
        self._added = re.compile("|".join(map(re.escape, found.added))) if found.added else None
        self._nfc = found.nfc
        self._doubtful = re.compile(f"[{re.escape(proof.doubtful)}]") if proof.doubtful else None
        self._before = np.array(found.before, dtype=np.uint32)
        self._after = np.array(found.after, dtype=np.uint32)

    def encode(self, texts: Sequence[str], *, special: bool) -> list[NDArray[np.uint32] | None]:
        """Ids of each text; None for one that this encoder cannot take."""
        ranks = [self._ranks(text) for text in texts]
        flat = self._ids[np.concatenate([_NONE, *(r for r in ranks if r is not None)])]
        found: list[NDArray[np.uint32] | None] = []
        at = 0
        for one in ranks:
            if one is None:
                found.append(None)
                continue
            ids = flat[at : at + one.size]
            at += one.size
            found.append(np.concatenate([self._before, ids, self._after]) if special else ids)
        return found

    def _ranks(self, text: str) -> NDArray[np.uint32] | None:
        if self._nfc and not text.isascii() and not self._is_normal(text):
            return None
        allowed = set(self._added.findall(text)) if self._added is not None else set()
        try:
            return np.frombuffer(self._encode(text, allowed), dtype=np.uint32)
        except (ValueError, RuntimeError):  # a lone surrogate, or a word too long for the regex engine
            return None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # how an abort in Rust arrives, outside of Exception
                raise
            return None

    def _is_normal(self, text: str) -> bool:
        return unicodedata.is_normalized("NFC", text) and not (self._doubtful and self._doubtful.search(text))


def _pattern(spec: Any) -> str:
    """How a text is cut into words."""
    parts = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec]
    kinds = [part and part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise NotProven(f"its pre-tokeniser is {' + '.join(map(str, kinds))}, not one Split and ByteLevel")
    if parts[-1]["add_prefix_space"]:
        raise NotProven("its pre-tokeniser puts a space before texts")
    if len(parts) == 1:
        if not parts[0]["use_regex"]:
            raise NotProven("its pre-tokeniser does not cut texts into words")
        return _GPT2
    split = parts[0]
    if parts[1]["use_regex"] or split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise NotProven("its pre-tokeniser cuts texts twice, or not by an isolating regular expression")
    return str(split["pattern"]["Regex"])


def _total(pattern: str) -> str:
    """The pattern, and the longest stretch that it does not match, which tiktoken would leave out."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _added(tokens: Iterable[dict[str, Any]], *, normalised: bool) -> dict[str, int]:
    """Text -> id of tokens that are found in texts before anything else; at each place one alone can begin."""
    found: dict[str, int] = {}
    kinds = set()
    for token in tokens:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise NotProven(f"its added token {token['content']!r} takes in white space, or whole words alone")
        if token["normalized"] and normalised:
            raise NotProven(f"its added token {token['content']!r} is looked for in normalised text")
        kinds.add(token["normalized"])
        found[token["content"]] = token["id"]
    if len(kinds) > 1:
        raise NotProven("its added tokens are looked for in two passes")
    names = sorted(found)
    for one, next_one in itertools.pairwise(names):
        if next_one.startswith(one):
            raise NotProven(f"its added token {one!r} is the beginning of {next_one!r}")
    return found


def _made(model: dict[str, Any]) -> tuple[list[str], set[str]]:
    """The 256 bytes, then what merges make, in their order; and what they make at several places of it."""
    alphabet, scattered = _alphabet(), set()
    if missing := [character for character in alphabet if character not in model["vocab"]]:
        raise NotProven(f"it has no token for {len(missing)} of 256 bytes")
    made = dict.fromkeys(alphabet)
    last = ""
    for merge in model["merges"]:
        token = "".join(_pair(merge))
        if token in made and token != last:
            scattered.add(token)
        elif not alphabet.keys() >= set(token):
            raise NotProven(f"its token {token!r} is not made of bytes")
        made[token] = None
        last = token
    return list(made), scattered


def _ranked(found: Structure, proof: Proof) -> list[str]:
    """Tokens in the order in which merges are made; behind them those that only whole words are."""
    reached = [token for token in found.made if found.vocabulary[token] not in proof.unreached]
    if not found.ignore_merges:
        return reached
    return [*reached, *(token for token in found.made if found.vocabulary[token] in proof.unreached), *found.whole]


def _bytes(token: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[character] for character in token)


@functools.cache
def _alphabet() -> dict[str, int]:
    """The character by which a byte-level tokenizer writes each byte: itself if it is printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printed)
    shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in sorted(printed)} | shifted


def _is_nfc(spec: Any) -> bool:
    if spec is None:
        return False
    parts = spec["normalizers"] if spec["type"] == "Sequence" else [spec]
    if [part["type"] for part in parts] != ["NFC"]:
        raise NotProven(f"its normaliser is {' + '.join(part['type'] for part in parts)}, not NFC")
    return True


def _around(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that are put before and after any text."""
    found = None
    for probe in _PROBES:
        plain = backend.encode(probe, add_special_tokens=False).ids
        whole = backend.encode(probe, add_special_tokens=True).ids
        if found is None:
            extra = len(whole) - len(plain)
            begin = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), None)
            if begin is None:
                raise NotProven("its post-processor does more than put ids around a text")
            found = tuple(whole[:begin]), tuple(whole[begin + len(plain) :])
        if whole != [*found[0], *plain, *found[1]]:
            raise NotProven("its post-processor does more than put the same ids around any text")
    assert found is not None
    return found


def _unreached(found: Structure) -> frozenset[int]:
    """Ids of tokens that the merges, left alone with a token's bytes, do not make of them.

    Raises:
        NotProven: such a token may be a word, and two pieces that make it may meet; or the order of one is not known.
    """
    from tokenizers import Tokenizer, models

    vocabulary = found.vocabulary
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[_pair(merge) for merge in found.merges]))
    unreached = set()
    tokens = [*found.made, *found.whole]
    for token, encoded in zip(tokens, bare.encode_batch_fast(tokens), strict=True):
        if encoded.ids == [vocabulary[token]]:
            if token in found.scattered:
                raise NotProven(f"its merges make {token!r} at two places of their order")
        elif found.ignore_merges and len(encoded.ids) == 2:
            raise NotProven(f"its merges leave {token!r} in two pieces, but a word of it is one token")
        else:
            unreached.add(vocabulary[token])
    return frozenset(unreached)


def _same_pattern(pattern: str) -> None:
    """Both engines know all that the pattern is made of, and put the same characters into each class."""
    if not _CONSTRUCTS.fullmatch(pattern):
        raise NotProven(f"its pattern has constructs that regex engines read differently: {pattern}")
    if re.fullmatch(re.sub(_ATOM, "a", pattern), ""):
        raise NotProven(f"its pattern matches the empty text: {pattern}")
    text = "".join(_CHARACTERS)
    for atom in sorted(set(re.findall(_ATOM, pattern))):
        _same_matches(atom, text)
    long_folds = "".join(f"'{c} '{c}{c} " for c in _CHARACTERS if len(c.casefold()) > 1)
    for group in sorted(set(_FOLDED.findall(pattern))):
        for letter in sorted({c for c in group[4:-1] if c.isalpha()}):
            _same_matches(f"(?i:{letter})", text)
        _same_matches(group, long_folds)


def _same_matches(pattern: str, text: str) -> None:
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    bytewise = {bytes([byte]): byte for byte in range(256)}
    theirs = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=bytewise, special_tokens={})
    ours = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text)
    if bytes(theirs.encode_ordinary(text)).decode() != "".join(match for match, _ in ours):
        raise NotProven(f"the regex engines differ in what {pattern} matches")


def _doubtful() -> set[str]:
    """Characters that this Python normalises by another version of Unicode than tokenizers, and their parts."""
    from tokenizers import normalizers

    found: set[str] = set()
    marks = ("{}", "\u0345{}", "{}\u0327")  # marks of a high and a low class: one of them changes places with any mark
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    engines = {"NFC": normalizers.NFC(), "NFD": normalizers.NFD()}
    for begin in range(0, len(_CHARACTERS), _AT_ONCE):
        some = [c for c in _CHARACTERS[begin : begin + _AT_ONCE] if c > "\x7f"]
        for form, mark in itertools.product(forms, marks):
            text = "\n".join(mark.format(c) for c in some)
            here, there = unicodedata.normalize(form, text), engines[form].normalize_str(text)
            if here != there:
                lines = zip(some, here.split("\n"), there.split("\n"), strict=True)
                found |= {part for c, one, other in lines if one != other for part in {c, *one, *other}}
    return found - {"\u0345", "\u0327"}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
