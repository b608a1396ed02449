"""What a recipe leaves open and arithmetic settles: precision before a device is seen, sizes of ZeRO's buffers."""

from __future__ import annotations

from typing import Literal

from launcher.recipe.schema import Recipe

LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's own default: 2 GB in bf16
SUB_GROUP = 1_000_000_000  # DeepSpeed's own default: more elements than a rank has, so that one update does all
SUB_GROUP_OFFLOADED = 100_000_000  # elements: 1.6 GB with moments and gradient


def planned_precision(recipe: Recipe) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    """`train.precision` before the device is seen, and why; the worker settles `auto` by the device itself."""
    if recipe.train.precision != "auto":
        return recipe.train.precision, "train.precision"
    if recipe.model.dtype == "bf16":
        return "bf16", "auto: model.dtype is bf16"
    if recipe.cluster.accelerator == "cpu":
        return "fp32", "auto: fp32 on the CPU"
    return "bf16", "auto: bf16 on a GPU that computes it natively, else fp32; the worker settles it"


def zero_sizes(recipe: Recipe, hidden: int, note: str = "") -> dict[str, tuple[int, str]]:
    """Elements and the reason of each size in `strategy.zero`, as given or chosen from the hidden size.

    The choices for buckets, prefetch and persistence are transformers' own rule for "auto".

    Args:
        note: what to add where the hidden size is told
    """
    told, zero = f"hidden size {hidden}{note}", recipe.strategy.zero
    offloaded = recipe.strategy.offload.optimizer != "none"
    update = "bounds the buffers of the offloaded update" if offloaded else "one update does all"
    chosen = {
        "reduce_bucket_size": (hidden * hidden, f"hidden^2, one square matrix: {told}"),
        "allgather_bucket_size": (12 * hidden * hidden, f"12 hidden^2, about one block: {told}"),
        "prefetch_bucket_size": (9 * hidden * hidden // 10, f"0.9 hidden^2: {told}"),
        "param_persistence_threshold": (10 * hidden, f"10 hidden, so that norms and biases stay whole: {told}"),
        "max_live_parameters": (LIVE_PARAMETERS, "DeepSpeed's default"),
        "sub_group_size": (SUB_GROUP_OFFLOADED if offloaded else SUB_GROUP, update),
    }
    given = {key: getattr(zero, key) for key in chosen}
    return {key: pair if given[key] is None else (given[key], f"strategy.zero.{key}") for key, pair in chosen.items()}
