"""Whether ranks that must hold the same weights do: a hash of them, compared over the ranks, and who differs named.

Weights, moments and what else an engine has on several ranks (`Engine.copies`) are read as integers on the GPU and
summed with a weight for each place, modulo 2^64: exact, the same in whatever order the device adds. Changing a single
element always changes the sum. What lies in host memory is hashed by xxh3, which a CPU does fifty times faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from launcher.trainer.failures import ReplicaError

if TYPE_CHECKING:
    from launcher.trainer.engines import Engine

_PART = 1 << 22  # elements that are looked at together: 32 MiB of integers, twice
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """Compares what the ranks of an engine hold in common.

    Args:
        every_steps: see `train.replica_check_steps`; None: never, and nothing here costs anything
        node: this rank's host, for people
    """

    def __init__(self, engine: Engine, *, every_steps: int | None, node: str) -> None:
        self._engine, self._every, self._node = engine, every_steps, node

    def due(self, step: int) -> bool:
        """Whether the weights are to be compared before the update of this step, from 1."""
        return self._every is not None and step % self._every == 0 and dist.get_world_size() > 1

    def compare(self, step: int) -> None:
        """Compare what the ranks hold after `step` updates; collective, waits for the device.

        Raises:
            ReplicaError: on every rank alike; names the ranks that differ.
        """
        if self._every is None or dist.get_world_size() == 1:
            return
        part, named = self._engine.copies()
        tensors = list(named)
        hashes = [fingerprint(tensor) for _, tensor in tensors]
        whole = combine(hashes) if hashes else torch.zeros((), dtype=torch.int64)
        own = torch.stack([torch.tensor(part), whole.cpu()]).to(self._engine.device)
        found = torch.empty(dist.get_world_size() * 2, dtype=torch.int64, device=self._engine.device)
        dist.all_gather_into_tensor(found, own)
        by_rank = [(int(at), int(value)) for at, value in found.view(-1, 2).tolist()]
        if odd := differing(by_rank):
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, (self._node, torch.stack(hashes).tolist()))
            names = [name for name, _ in tensors]
            raise ReplicaError(message(step, odd, [node for node, _ in told], names, [found for _, found in told]))


Odd = tuple[list[int], list[int]]  # the ranks that differ, those they differ from; the latter empty: nobody can say


def differing(by_rank: Sequence[tuple[int, int]]) -> Odd | None:
    """Who differs from the ranks that hold the same part, by majority; None if nobody does.

    Args:
        by_rank: (number of the part, hash of it) of each rank
    """
    for part in sorted({part for part, _ in by_rank}):
        members = [rank for rank, (own, _) in enumerate(by_rank) if own == part]
        votes = Counter(by_rank[rank][1] for rank in members)
        if len(votes) == 1:
            continue
        (most, count), *_ = votes.most_common()
        if 2 * count <= len(members):
            return members, []
        odd = [rank for rank in members if by_rank[rank][1] != most]
        return odd, [rank for rank in members if rank not in odd]
    return None


def message(
    step: int, odd: Odd, nodes: Sequence[str], names: Sequence[str], hashes: Sequence[Sequence[int]]
) -> str:  # fmt: skip
    """What is said of ranks that differ.

    Args:
        nodes, hashes: of each rank; names: of the tensors that the hashes are of
    """
    ranks, others = odd
    one, other = ranks[0], others[0] if others else ranks[1]
    wrong = [name for name, a, b in zip(names, hashes[one], hashes[other], strict=False) if a != b]
    where = f"{wrong[0]}{f' and {len(wrong) - 1} more tensors' if len(wrong) > 1 else ''}" if wrong else "its state"
    shown = " and ".join(f"rank {rank} on {nodes[rank]}" for rank in ranks)
    if others:
        who = f"{shown} hold{'s' if len(ranks) == 1 else ''} other weights than the other {len(others)} ranks"
    else:
        who = f"{shown} hold different weights, and no majority says which of them is right"
    return (
        f"after step {step}: {who}, first in {where} (train.replica_check_steps). Their memory, or a "
        "computation of theirs, has erred: watch these devices. The last checkpoint was compared before it was "
        "written, so the run can go on from it."
    )


def fingerprint(tensor: Tensor) -> Tensor:
    """The hash of a tensor's bytes, 0-d int64 on its device; on a GPU nobody waits for it."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "cpu":
        digest = xxhash.xxh3_64_digest(flat.contiguous().view(torch.uint8).numpy())
        return torch.tensor(int.from_bytes(digest, "big", signed=True))
    return weighted_sum(flat)


def weighted_sum(flat: Tensor) -> Tensor:
    """Elements as integers, each times the odd number of its place, modulo 2^64; 0-d int64 on the device."""
    flat = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    odd = torch.arange(1, 2 * min(_PART, flat.numel()), 2, dtype=torch.int64, device=flat.device)
    for part in flat.split(_PART):
        total = total * _ODD + (odd[: part.numel()] * part).sum()
    return total


def combine(hashes: Sequence[Tensor]) -> Tensor:
    """One hash of several, in their order."""
    return fingerprint(torch.stack(list(hashes)))
