"""Which tokenizer a recipe means: finds, hashes, loads and describes it; hashing local files imports nothing heavy."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError

# files that decide what ids a text becomes
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*", "*.py",
    "config.json",
)  # fmt: skip
_MARK = re.compile(r"<\|\w+\|>")
_FAST_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class, under its old and its new name
_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")
_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]")


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Which tokenizer, and with which template.

    name: folder, tokenizer.json file or hub id
    revision: branch, tag or commit of a hub id
    trust_remote_code: run Python code that comes with it
    template: text of a Jinja chat template that replaces its own
    template_file: where that text is from, for messages
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    template: str | None = None
    template_file: str | None = None

    @property
    def template_called(self) -> str:
        """What messages call the chat template."""
        if self.template is None:
            return f"the chat template of model.tokenizer = {self.name}"
        return f"data.chat_template = {self.template_file}" if self.template_file else "data.chat_template"


def locate(name: str, revision: str | None = None) -> Path:
    """Folder or file of a tokenizer or model on this machine; a hub id is fetched into the hub's cache.

    Raises:
        UserError: neither a path nor a hub id that can be fetched.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    return _fetch(name, revision)


@cache
def _fetch(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_TOKENIZER_FILES)))
    except Exception as error:
        raise UserError(
            f"model.tokenizer = {name}: no such file or folder, and the hub gave nothing: "
            f"{type(error).__name__}: {error}"
        ) from error


def hash_tokenizer(spec: TokenizerSpec) -> str:
    """Hash of every file that decides ids, and of the template; needs no transformers for local files."""
    place = locate(spec.name, spec.revision)
    digest = xxhash.xxh3_128(repr(spec.template).encode())
    for file in [place] if place.is_file() else sorted({f for p in _TOKENIZER_FILES for f in place.glob(p)}):
        content = file.read_bytes()
        if file.name == "config.json":  # only the tokenizer's class may come from the model's configuration
            content = str(json.loads(content).get("tokenizer_class")).encode()
        digest.update(repr((file.name if place.is_dir() else "tokenizer.json", len(content))).encode())
        digest.update(content)
    return digest.hexdigest()


def load_tokenizer(spec: TokenizerSpec) -> Any:
    """The tokenizer; a bare tokenizer.json is enough, its end token is then found among its added tokens.

    Raises:
        UserError: nothing there can be loaded as a tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    place = locate(spec.name, spec.revision)
    file = place if place.is_file() else place / "tokenizer.json"
    try:
        if is_bare(spec):
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
            added = set(tokenizer.get_added_vocab())
            for name, candidates in (("eos_token", _EOS), ("pad_token", _PAD), ("bos_token", _BOS)):
                found = next((token for token in candidates if token in added), None)
                if found is not None:
                    setattr(tokenizer, name, found)
            template = file.with_name("chat_template.jinja")
            if template.exists():
                tokenizer.chat_template = template.read_text()
        elif _names_its_class(place):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(place))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise UserError(f"model.tokenizer = {spec.name}: cannot be loaded: {type(error).__name__}: {error}") from error
    if spec.template is not None:
        tokenizer.chat_template = spec.template
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def is_bare(spec: TokenizerSpec) -> bool:
    """Whether nothing but a tokenizer.json is there, which does not say what ends a text."""
    place = locate(spec.name, spec.revision)
    return place.is_file() or ((place / "tokenizer.json").exists() and not (place / "tokenizer_config.json").exists())


def replaces_template(spec: TokenizerSpec) -> bool:
    """Whether the given template takes the place of another one that comes with the tokenizer."""
    place = locate(spec.name, spec.revision)
    folder = place.parent if place.is_file() else place
    own: set[Any] = {file.read_text("utf-8") for file in folder.glob("chat_template.jinja")}
    for name in () if place.is_file() else ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).exists():
            own.add(json.loads((folder / name).read_text("utf-8")).get("chat_template"))
    return spec.template is not None and any(text != spec.template for text in own if isinstance(text, str))


def _names_its_class(folder: Path) -> bool:
    """Whether the class is plain from the folder: AutoTokenizer would say the same, but imports torch to do so."""
    file = folder / "tokenizer_config.json"
    if (folder / "config.json").exists() or not ((folder / "tokenizer.json").exists() and file.exists()):
        return False  # a model's type may change the class
    config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("tokenizer_class") in _FAST_CLASSES and "auto_map" not in config


def describe_tokenizer(spec: TokenizerSpec, tokenizer: Any) -> dict[str, Any]:
    """What others need to know of a tokenizer without loading it; JSON-compatible.

    vocab_size: largest id + 1; text_vocab_size: the same without special tokens, which data need not use
    """
    vocabulary = tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {
        "name": spec.name,
        "revision": spec.revision,
        "vocab_size": max(vocabulary.values()) + 1,
        "text_vocab_size": max((i for token, i in vocabulary.items() if token not in special), default=0) + 1,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def unknown_marks(tokenizer: Any) -> list[str]:
    """Marks, as <|turn|>, that the chat template holds and the tokenizer reads as plain text."""
    text = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return sorted(set(_MARK.findall(text)) - tokenizer.get_added_vocab().keys())


def missing_bytes(tokenizer: Any) -> bytes:
    """Bytes that a byte-level tokenizer has no token for; it drops them from texts without a word.

    Reference: GPT-2's ``bytes_to_unicode``: bytes that are no printable Latin-1 characters are written from 256 on.
    """
    from tokenizers import decoders

    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return b""
    if tokenizer.unk_token is not None:
        return b""
    vocabulary = tokenizer.get_vocab()
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(
        byte for byte in range(256) if chr(byte if byte in printable else 256 + others.index(byte)) not in vocabulary
    )
