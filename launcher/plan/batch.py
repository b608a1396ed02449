"""Batch arithmetic: how a global batch of rows splits into micro-batches on ranks."""

from __future__ import annotations


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes of each rank in one optimizer step; slots beyond the batch are rows of weight 0."""
    return -(-global_batch_size // (micro_batch_size * world_size))
