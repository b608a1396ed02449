"""Section `strategy`: how model state is spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Offload:
    """What is kept outside GPU memory.

    optimizer: where moments and the update live; nvme only with zero3
    params: where the sharded weights live between uses; fsdp2 or zero3, nvme only with zero3
    nvme_path: folder on each node's local disk for what goes to nvme
    """

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    params: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None


@dataclass(kw_only=True, slots=True)
class Zero:
    """How DeepSpeed's ZeRO uses memory and links; null is a value chosen from the model, `launcher render --explain`
    says which and why.

    reduce_bucket_size: elements of gradients reduced together
    allgather_bucket_size: elements of weights gathered together after the update (zero1, zero2)
    overlap_comm: reduce gradients while the backward pass goes on; auto: on a GPU
    param_persistence_threshold: weights of fewer elements stay whole on each rank (zero3)
    prefetch_bucket_size: elements of weights gathered ahead of their use (zero3)
    max_live_parameters: elements of weights that may be whole on a rank at a time (zero3)
    sub_group_size: elements updated together, which bounds what an offloaded update holds (zero3)
    hpz_partition_size: ZeRO++: ranks that hold a second copy of the shards among them, usually those of a node;
        1: none (zero3)
    quantized_weights: ZeRO++: gather weights in 8 bit (zero3)
    quantized_gradients: ZeRO++: reduce gradients in 4 bit (zero3)
    leaf_modules: classes gathered whole, as blocks of experts must be; null: chosen by architecture (zero3)
    """

    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    overlap_comm: Literal["auto", True, False] = "auto"
    param_persistence_threshold: int | None = None
    prefetch_bucket_size: int | None = None
    max_live_parameters: int | None = None
    sub_group_size: int | None = None
    hpz_partition_size: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    leaf_modules: list[str] | None = None


@dataclass(kw_only=True, slots=True)
class Strategy:
    """How model state is spread over the ranks.

    kind: ddp keeps a whole copy on each rank; fsdp2 shards weights, gradients and moments (`fully_shard`); DeepSpeed's
        zero1 shards moments, zero2 gradients too, zero3 weights too
    replicate: copies of the sharded model (HSDP, fsdp2 only); null: world size / shard
    shard: ranks that share one copy (fsdp2 only); null: all ranks, or world size / replicate
    offload: what is kept outside GPU memory
    reshard_after_forward: fsdp2 frees gathered weights after each block's forward; false trades memory for traffic; a
        number reshards to groups of so many ranks, usually those of a node
    prefetch: blocks whose weights fsdp2 gathers ahead of their use, forward and backward; null: torch's own choice
    zero: how ZeRO uses memory and links
    deepspeed: laid over the DeepSpeed configuration made from the keys above, for everything that has no key here
    """

    kind: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "fsdp2"
    replicate: int | None = None
    shard: int | None = None
    offload: Offload = field(default_factory=Offload)
    reshard_after_forward: bool | int = True
    prefetch: int | None = None
    zero: Zero = field(default_factory=Zero)
    deepspeed: dict[str, Any] = field(default_factory=dict)


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
