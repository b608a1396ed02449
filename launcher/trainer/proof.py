"""Proves on the built engine, before the first step, that the documents of a row do not see each other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.data.batches import MicroBatch
from launcher.errors import UserError
from launcher.trainer.objectives import to_batch

if TYPE_CHECKING:
    from launcher.trainer.engines import Engine

_TOKENS = 16  # of each of the two documents
_TOLERANCE = 1e-6


def prove_isolation(engine: Engine, *, backend: str, vocab_size: int, compiled: bool = False) -> float:
    """Change the first document of a row and see that the second one's loss stays the same.

    Shapes and kernels are equal in both forwards, so any difference is a leak, in every precision. Collective.

    Args:
        compiled: blocks are compiled; the proof runs them as they are, because it would cost two compilations more
    Returns:
        The relative difference.
    Raises:
        UserError: the back end lets documents see each other.
    """
    losses = []
    for seed in (1, 2):
        first = np.random.default_rng(seed).integers(0, vocab_size, _TOKENS)
        second = np.random.default_rng(0).integers(0, vocab_size, _TOKENS)
        batch = to_batch(two_documents(first, second), backend=backend).to(engine.device)
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            losses.append(float(engine.evaluate(batch)))
    difference = abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-30)
    if not difference <= _TOLERANCE:
        raise UserError(
            f"model.attention = {backend}: documents of one row see each other with this model (loss changes by "
            f"{difference:.1e} when another document changes). Use model.attention=sdpa or eager."
        )
    return difference


def two_documents(first: NDArray[np.int64], second: NDArray[np.int64]) -> MicroBatch:
    """One row of two documents of which only the second is trained."""
    ids = np.concatenate([first, second]).astype(np.int64)
    weights = np.zeros((1, len(ids)), np.float32)
    weights[0, len(first) : -1] = 1
    return MicroBatch(
        input_ids=ids[None],
        position_ids=np.concatenate([np.arange(len(first)), np.arange(len(second))])[None],
        targets=np.roll(ids, -1)[None],
        weights=weights,
        cu_seqlens=np.array([0, len(first), len(ids)], np.int32),
        max_seqlen=max(len(first), len(second)),
        rows=[],
        documents=[],
        tokens=len(ids),
    )
