"""Section `strategy`: how model state is spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Offload:
    """What is kept in host memory instead of GPU memory.

    optimizer: where moments and the update live
    params: where the sharded weights live between uses
    nvme_path: folder on a local disk for nvme offload
    """

    optimizer: Literal["none", "cpu"] = "none"
    params: Literal["none", "cpu"] = "none"
    nvme_path: str | None = None


@dataclass(kw_only=True, slots=True)
class Strategy:
    """How model state is spread over the ranks.

    kind: ddp keeps a whole copy on each rank; fsdp2 shards weights, gradients and moments (`fully_shard`)
    replicate: copies of the sharded model (HSDP); null: world size / shard
    shard: ranks that share one copy; null: all ranks for fsdp2, 1 for ddp
    offload: what is kept in host memory
    reshard_after_forward: fsdp2 frees gathered weights after each block's forward; false trades memory for traffic
    """

    kind: Literal["ddp", "fsdp2"] = "fsdp2"
    replicate: int | None = None
    shard: int | None = None
    offload: Offload = field(default_factory=Offload)
    reshard_after_forward: bool = True


def check(strategy: Strategy) -> Iterator[Problem]:
    """Rules of this section alone."""
    offload = strategy.offload
    for key in ("replicate", "shard"):
        value = getattr(strategy, key)
        if value is not None and value < 1:
            yield Problem(f"strategy.{key}", value, "1 rank or more, or null")
    if strategy.kind == "ddp" and strategy.shard not in (None, 1):
        yield Problem(
            "strategy.shard", strategy.shard, "1 or null with ddp, which shards nothing", "Use strategy.kind=fsdp2."
        )
    if strategy.kind == "ddp" and (offload.params, offload.optimizer) != ("none", "none"):
        yield Problem("strategy.offload", "cpu", "none with ddp", "Use strategy.kind=fsdp2 to offload.")
    if strategy.kind == "ddp" and not strategy.reshard_after_forward:
        yield Problem("strategy.reshard_after_forward", False, "true (the default) with ddp, which never reshards")
    if strategy.kind == "fsdp2" and offload.params != offload.optimizer:
        yield Problem(
            "strategy.offload.optimizer", offload.optimizer, f"{offload.params}, as offload.params",
            "fsdp2 keeps weights and moments in the same memory: set both to cpu, or both to none.",
            because=("strategy.kind", "strategy.offload.params"),
        )  # fmt: skip
    if offload.nvme_path is not None:
        yield Problem("strategy.offload.nvme_path", offload.nvme_path, "null: ddp and fsdp2 cannot offload to nvme")
