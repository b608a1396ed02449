"""Section `strategy`: how model state is spread over the ranks."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.errors import Problem, show_value


@dataclass(kw_only=True, slots=True)
class Offload:
    """What is kept outside GPU memory. State on nvme is not promised bit-exact when a run is resumed.

    optimizer: where moments and the update live: fsdp2 (as params) or ZeRO, nvme only with zero3; on nvme a resumed
        run goes on closely, but is not promised to go on bit for bit
    params: where the sharded weights live between uses: fsdp2 or zero3, nvme only with zero3, with the same reserve
    nvme_path: folder on each node's local disk for what goes to nvme, an absolute path
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
    quantized_weights: ZeRO++: gather weights in 8 bit (zero3, on GPUs)
    quantized_gradients: ZeRO++: reduce gradients in 4 bit across nodes (zero3, with
        strategy.deepspeed.communication_data_type fp16: DeepSpeed reads any other type as fp16)
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
    yield from _keys_of_others(strategy)
    yield from _mesh(strategy)
    yield from _offload(strategy)
    yield from _nvme_path(strategy.offload)
    yield from _zero(strategy.zero)
    again = strategy.reshard_after_forward
    if not isinstance(again, bool) and again < 2:
        fix = "Write false to keep gathered weights until the backward pass."
        yield Problem("strategy.reshard_after_forward", again, "true, false, or a group of 2 ranks or more", fix)
    if strategy.prefetch is not None and strategy.prefetch < 1:
        yield Problem("strategy.prefetch", strategy.prefetch, "1 block or more, or null for torch's own choice")


_FSDP2: tuple[str, ...] = ("fsdp2",)
_ZERO3: tuple[str, ...] = ("zero3",)
_ZERO: tuple[str, ...] = ("zero1", "zero2", "zero3")
_READ_BY = {  # the strategies that read a key; with any other it must hold its default, for it would be ignored
    "reshard_after_forward": _FSDP2,
    "prefetch": _FSDP2,
    "zero.reduce_bucket_size": _ZERO,
    "zero.allgather_bucket_size": ("zero1", "zero2"),
    "zero.overlap_comm": _ZERO,
    "zero.param_persistence_threshold": _ZERO3,
    "zero.prefetch_bucket_size": _ZERO3,
    "zero.max_live_parameters": _ZERO3,
    "zero.sub_group_size": _ZERO3,
    "zero.hpz_partition_size": _ZERO3,
    "zero.quantized_weights": _ZERO3,
    "zero.quantized_gradients": _ZERO3,
    "zero.leaf_modules": _ZERO3,
    "deepspeed": _ZERO,
}
_ON_GPU = ("none",), "which keeps whole copies in GPU memory"
_WHOLE = ("none",), "which keeps the weights whole on each rank"
_HOST = ("none", "cpu"), "which cannot use nvme"
_ANYWHERE = ("none", "cpu", "nvme"), ""
_PLACES = {  # where a strategy can keep state, and why nowhere else
    ("ddp", "optimizer"): _ON_GPU,
    ("ddp", "params"): _ON_GPU,
    ("fsdp2", "optimizer"): _HOST,
    ("fsdp2", "params"): _HOST,
    ("zero1", "optimizer"): _HOST,
    ("zero1", "params"): _WHOLE,
    ("zero2", "optimizer"): _HOST,
    ("zero2", "params"): _WHOLE,
    ("zero3", "optimizer"): _ANYWHERE,
    ("zero3", "params"): _ANYWHERE,
}
_LEAST = {
    "reduce_bucket_size": 1,
    "allgather_bucket_size": 1,
    "param_persistence_threshold": 0,
    "prefetch_bucket_size": 0,
    "max_live_parameters": 0,
    "sub_group_size": 1,
    "hpz_partition_size": 1,
}


def _keys_of_others(strategy: Strategy) -> Iterator[Problem]:
    default = Strategy()
    for key, kinds in _READ_BY.items():
        value, unset = operator.attrgetter(key)(strategy), operator.attrgetter(key)(default)
        if strategy.kind not in kinds and value != unset:
            readers = f"only {kinds[0]} reads" if len(kinds) == 1 else f"only {', '.join(kinds)} read"
            expected = f"{show_value(unset)} (the default) with {strategy.kind}: {readers} it"
            fix = f"Remove the key, or use strategy.kind={kinds[-1]}."
            yield Problem(f"strategy.{key}", value, expected, fix, because=("strategy.kind",))


def _mesh(strategy: Strategy) -> Iterator[Problem]:
    kind, because = strategy.kind, ("strategy.kind",)
    for key in ("replicate", "shard"):
        value = getattr(strategy, key)
        if value is None:
            continue
        if value < 1:
            yield Problem(f"strategy.{key}", value, "1 rank or more, or null")
        elif kind in _ZERO:
            fix = "Use strategy.kind=fsdp2 for shards in groups and copies across them."
            yield Problem(
                f"strategy.{key}", value, f"null with {kind}, which shards over all ranks", fix, because=because
            )
        elif kind == "ddp" and key == "shard" and value != 1:
            expected = "1 or null with ddp, which shards nothing"
            yield Problem("strategy.shard", value, expected, "Use strategy.kind=fsdp2.", because=because)


def _offload(strategy: Strategy) -> Iterator[Problem]:
    """State that the strategy cannot keep there; one complaint a key."""
    kind, offload, wrong = strategy.kind, strategy.offload, False
    for key in ("optimizer", "params"):
        value, (places, why) = getattr(offload, key), _PLACES[kind, key]
        if value not in places:
            wrong = True
            fix = f"Use strategy.kind={'fsdp2' if kind == 'ddp' and value == 'cpu' else 'zero3'}."
            expected = f"{' or '.join(places)} with {kind}, {why}"
            yield Problem(f"strategy.offload.{key}", value, expected, fix, because=("strategy.kind",))
    if kind == "fsdp2" and not wrong and offload.params != offload.optimizer:
        yield Problem(
            "strategy.offload.optimizer", offload.optimizer, f"{offload.params}, as offload.params",
            "fsdp2 keeps weights and moments in the same memory: set both to cpu, or both to none.",
            because=("strategy.kind", "strategy.offload.params"),
        )  # fmt: skip


def _nvme_path(offload: Offload) -> Iterator[Problem]:
    on_nvme = [key for key in ("optimizer", "params") if getattr(offload, key) == "nvme"]
    because = ("strategy.offload.optimizer", "strategy.offload.params")
    path = offload.nvme_path
    if on_nvme and not path:
        expected = f"a folder on each node's local disk, because offload.{on_nvme[0]} = nvme"
        yield Problem("strategy.offload.nvme_path", path, expected, "Write e.g. /local_nvme.", because=because)
    elif path is not None and not on_nvme:
        fix = "Remove the key, or write offload.optimizer=nvme."
        yield Problem("strategy.offload.nvme_path", path, "null: nothing is offloaded to nvme", fix, because=because)
    elif path is not None and not path.startswith("/"):
        yield Problem("strategy.offload.nvme_path", path, "an absolute path, the same on each node")


def _zero(zero: Zero) -> Iterator[Problem]:
    for key, least in _LEAST.items():
        value = getattr(zero, key)
        if value is not None and value < least:
            null = ", or null" if key != "hpz_partition_size" else ", where 1 means no second copy"
            yield Problem(f"strategy.zero.{key}", value, f"{least} or more{null}")
    if zero.leaf_modules is not None and not all(zero.leaf_modules or [""]):
        fix = "Write null to have them chosen by architecture."
        yield Problem("strategy.zero.leaf_modules", zero.leaf_modules, "names of classes, or null", fix)
