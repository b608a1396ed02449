"""A small byte-level BPE tokenizer with the ChatML template, trained on the spot and saved as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launcher.shipped import folder as shipped


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> int:
    """Train on `texts` and save into `folder`; returns the number of tokens, special ones included.

    Byte-level, so that every text can be written: no unknown token. `<|im_end|>` ends a turn, `<|endoftext|>` pads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = (shipped("recipes") / "chat_templates" / "chatml.jinja").read_text()
    wrapped.save_pretrained(folder)
    return len(wrapped)
