"""Small stores, tokenizers and recipes for tests, made in code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.data.rows import Held, build_rows
from launcher.data.store import Encoded, Side, write_part, write_store
from launcher.recipe.schema import Data, Recipe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the meaning of life? It is 42.",
    "def add(a, b):\n    return a + b\n\nQuestions and answers, one after the other; who are you? I am a small model.",
    "user assistant system Hello! How can I help you today? 0123456789 Once upon a time there was a tiny story.",
]


def tiny_store(
    folder: Path,
    lengths: Sequence[int],
    vocab: int = 97,
    seed: int = 0,
    *,
    seq_len: int = 64,
    packing: str = "best_fit",
    trained: float = 0.7,
    sides: Sequence[int] | None = None,
    isolate: bool = True,
    repack: int = 1,
) -> Path:
    """A store of random documents of these lengths; about `trained` of their tokens are targets. Returns its path."""
    random = np.random.default_rng(seed)
    encoded = Encoded()
    for number, length in enumerate(lengths):
        weights = (random.random(length) < trained).astype(np.uint8)
        weights[-1] = 1
        side = sides[number] if sides else Side.plain
        record = number - (side == Side.rejected)
        tokens = random.integers(0, vocab, length, dtype=np.uint32)
        encoded.add(tokens, weights, file=0, record=record, side=side, hash=record)
    parts = [folder / "tokens" / "part-00000"]
    write_part(parts[0], encoded, vocab_size=vocab)
    recipe = Recipe(data=Data(seq_len=seq_len, packing=packing, isolate=isolate))  # type: ignore[arg-type]
    rows = build_rows([parts], [["made"]], held=Held.all, recipe=recipe, repack=repack)
    path = folder / "packed" / "tiny"
    write_store(
        path,
        parts=parts,
        files=["made"],
        index=rows.index,
        packings=rows.packings,
        seq_len=seq_len,
        isolate=isolate,
        meta={"key": "tiny", "vocab_size": vocab},
    )
    return path


def tiny_tokenizer(
    folder: Path, *, vocab_size: int = 400, template: str | None = CHATML, special: Sequence[str] = ()
) -> Path:
    """A byte-level BPE tokenizer with ChatML tokens, saved as a usual Hugging Face folder. Returns the folder.

    Args:
        special: more special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One record a line. Returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
