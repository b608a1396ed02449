"""What the forward pass keeps for the backward pass, in bytes: activations of the blocks, and the loss over the words.

The formulas count what autograd saves in transformers' own code, operation by operation, as
`tests/plan/test_activations.py` reads it from real models. Where a GPU kernel keeps less, they are an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.plan.parameters import Sizes, Weight

# Logits alive at once in the loss: the trainer's objectives.chunked.CHUNK_BYTES, which this side cannot import.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
MASKED = ("sdpa", "eager")  # attention that keeps documents apart by a mask of seq_len x seq_len

Recomputation = Literal["none", "selective", "full", "offload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """In which types and by which kernels a forward pass runs.

    compute: bytes of a number in matrix products
    weight: bytes of a weight as the forward pass sees it
    autocast: weights and the residual stream keep the type of the weights, each product rounds its inputs for itself
    attention: back end, as the recipe's model.attention; auto is a flash kernel on a GPU and sdpa without one
    liger: Liger's fused kernels are certain
    device: cpu or cuda
    """

    compute: int
    weight: int
    autocast: bool = False
    attention: str = "auto"
    liger: bool = False
    device: str = "cuda"

    @property
    def residual(self) -> int:
        """Bytes of a number in the stream between blocks."""
        return self.weight if self.autocast else self.compute

    @property
    def masked(self) -> bool:
        """Whether attention takes a mask of seq_len x seq_len."""
        return self.attention in MASKED or (self.attention == "auto" and self.device == "cpu")


def block_bytes(size: Sizes, how: Arithmetic, seq_len: int) -> int:
    """What one block keeps for each token of a row of `seq_len` tokens, nothing recomputed."""
    return _norms(size, how) + _attention(size, how, seq_len) + _feed_forward(size, how)


def adapter_bytes(found: Sequence[Weight], how: Arithmetic, *, dropout: float, layers: int) -> int:
    """What the adapters of one block keep beside that for each token: copies of their inputs, and what lies between
    the two thin matrices."""
    pairs = [w for w in found if w.adapter and w.blocks]
    copied = how.compute if how.autocast else 0
    dropped = how.compute + 1 if dropout else 0  # the result and its mask
    inputs = pairs[::2]  # [rank, inputs], then [outputs, rank]
    kept = sum((w.shape[1] * (copied + dropped) + w.shape[0] * how.compute) * w.times for w in inputs)
    return -(-kept // layers)


def kept_bytes(size: Sizes, how: Arithmetic, mode: Recomputation, *, tokens: int, seq_len: int, more: int = 0) -> int:
    """Device memory of all activations of a micro-batch outside the loss.

    more: bytes a token and block beside those of `block_bytes`, the adapters'
    """
    whole = block_bytes(size, how, seq_len) + more
    border = how.residual * size.hidden  # a block's input
    outside = border + _norm(size, how) * size.hidden + how.compute * size.hidden  # embedding, last norm, loss's input
    per_token = {
        "none": size.layers * whole,
        "selective": size.layers * (border + _products(size, how, seq_len)) + whole,
        "full": size.layers * border + whole,
        "offload": 2 * border + whole,  # one block's input on its way out, one on its way in
    }[mode]
    mask = tokens * seq_len if how.masked else 0
    return tokens * (per_token + outside) + mask


def host_bytes(size: Sizes, how: Arithmetic, tokens: int) -> int:
    """Host memory of a rank whose blocks' inputs wait there (gradient_checkpointing: offload)."""
    return size.layers * how.residual * size.hidden * tokens


def loss_bytes(size: Sizes, how: Arithmetic, *, tokens: int, head_trained: bool, softcap: bool = False) -> int:
    """Memory of the loss over the vocabulary: a chunk of logits, the gradient of the head and of the hidden states.

    Liger chooses its chunk by its own rule and falls back to ours where tokens have weights: the larger counts.
    """
    chunk_tokens = min(tokens, max(1, CHUNK_BYTES[how.device] // (4 * size.vocab)))
    logits = chunk_tokens * size.vocab * (4 + how.compute * (how.compute != 4) + 8 * softcap)
    if how.liger:
        chunks = -(-size.vocab // size.hidden)
        part = 1 << max(0, math.ceil(-(-tokens // chunks)) - 1).bit_length()
        logits = max(logits, min(part, tokens) * size.vocab * how.compute)
    # fp32 sum and one product, or what is kept and its scaled copy, whichever is more
    head = max(4 + how.compute * (how.compute != 4), 2 * how.weight) * size.vocab * size.hidden if head_trained else 0
    return logits + head + tokens * size.hidden * how.compute


def _norm(size: Sizes, how: Arithmetic) -> int:
    """Bytes that a norm keeps of each number, its own result not counted."""
    if size.norm == "layer":
        return how.residual
    if how.liger and size.norm == "rms":
        return how.residual
    return 4 + (4 if size.norm == "rms32" else how.residual)


def _norms(size: Sizes, how: Arithmetic) -> int:
    """The norms, and their results as what the layers behind them keep."""
    inputs = (1 if size.fused else 3) + (2 if size.gated and not size.fused else 1) if how.autocast else 2
    return size.norms * (_norm(size, how) * size.hidden + 4 * (2 if size.norm == "layer" else 1)) + (
        inputs * how.compute * size.hidden
    )


def _attention(size: Sizes, how: Arithmetic, seq_len: int) -> int:
    c, q, k = how.compute, size.queries, size.keys
    total = c * (2 * q + 2 * k) + 4 * size.heads  # queries, keys, values, result; log of the sum of exponentials
    if size.fused and size.rotary:
        total += c * (q + k)  # the values keep the whole product alive, queries and keys were turned out of it
    if size.qk_norm:
        heads = size.heads * (q + k) // q if size.qk_norm == "head" else 2
        total += (4 + (4 if size.norm == "rms32" else c)) * (q + k) + 4 * heads
    if not how.masked:
        return total
    total += c * 2 * (q - k)  # keys and values repeated for each query's head
    if how.attention != "eager":
        return total + c * seq_len  # the mask in the type of the queries
    probabilities = 4 + (c if c != 4 else 0)
    return total - 4 * size.heads + size.heads * seq_len * (probabilities + c * size.softcap + 3 * (not size.rotary))


def _feed_forward(size: Sizes, how: Arithmetic) -> int:
    c = how.compute
    if size.experts:
        return c * (4 * size.ffn + 2 * size.experts * size.hidden) + 25 * size.all_experts
    if size.gated:
        return c * size.ffn * (3 if how.liger else 4)
    return c * size.ffn * (2 if size.rotary else 7)  # GPT-2's own gelu is a formula of six steps


def _products(size: Sizes, how: Arithmetic, seq_len: int) -> int:
    """Results of matrix products and of attention, which selective recomputation keeps."""
    attention = how.compute * (2 * size.queries + 2 * size.keys + size.hidden) + 4 * size.heads
    if how.attention == "eager":
        attention += how.compute * size.heads * seq_len  # the scores
    inner = (2 if size.gated else 1) * size.ffn
    return attention + how.compute * (inner + max(1, size.experts) * size.hidden)
