"""Where random numbers of a step come from: a key of (seed, step, rank), so that resuming needs no stored state."""

from __future__ import annotations

import torch


def random_state_key(seed: int, step: int, rank: int) -> int:
    """64 bits from (seed, step, rank), by splitmix64 over each in turn."""
    key = 0
    for value in (seed, step, rank):
        key = (key + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key


def rekey(seed: int, step: int, rank: int) -> None:
    """Give dropout and the like a fresh stream for this step, so that nothing of it has to be stored to resume."""
    torch.manual_seed(random_state_key(seed, step, rank))
