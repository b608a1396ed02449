"""Batch arithmetic: how a global batch of rows splits into micro-batches on ranks."""

from __future__ import annotations


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes of each rank in one optimizer step; slots beyond the batch are rows of weight 0."""
    return -(-global_batch_size // (micro_batch_size * world_size))


def empty_slots(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Rows of weight 0 in each step: places of the ranks' micro-batches that the global batch does not fill."""
    steps = accumulation_steps(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    return micro_batch_size * steps * world_size - global_batch_size
