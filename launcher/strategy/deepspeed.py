"""DeepSpeed's configuration of a recipe: one literal JSON, a reason for each value, and what may be laid over it.

Written for DeepSpeed 0.19; standard library only. No value is "auto": what runs is what the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from launcher.errors import Problem
from launcher.plan import Plan
from launcher.plan.batch import accumulation_steps
from launcher.plan.chosen import planned_precision, zero_sizes
from launcher.plan.parameters import read_config, weights
from launcher.recipe.schema import Recipe
from launcher.strategy.explained import Explained, dotted, nested

Device = Literal["cuda", "cpu"]
Type = Literal["fp32", "bf16", "fp16"]

ASSUMED_HIDDEN = 4096  # where the architecture is not known here: that of 7B and 8B models
ASSUMED_LARGEST = 128_256 * 4096  # elements of the largest weight, likewise: the embedding of Llama 3
NEVER = 1_000_000_000  # steps

# Blocks of experts, by model_type: which experts run changes with the data, so ZeRO-3 can neither trace nor prefetch
# their weights one by one; as a leaf the block is gathered whole on every rank, or the ranks wait for each other.
MOE_BLOCKS = {
    "mixtral": "MixtralSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "qwen3_next": "Qwen3NextSparseMoeBlock",
    "olmoe": "OlmoeSparseMoeBlock",
    "phimoe": "PhimoeSparseMoeBlock",
    "deepseek_v2": "DeepseekV2Moe",
    "deepseek_v3": "DeepseekV3MoE",
    "glm4_moe": "Glm4MoeMoE",
    "gpt_oss": "GptOssMLP",
    "granitemoe": "GraniteMoeMoE",
    "jamba": "JambaSparseMoeBlock",
}


def config(recipe: Recipe, *, world_size: int, device: Device, precision: Type) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` takes, for these ranks, this device and this type of arithmetic."""
    return nested(explain(recipe, world_size=world_size, device=device, precision=precision))


def explain(recipe: Recipe, *, world_size: int, device: Device, precision: Type) -> Explained:
    """Each value of `config` by its dotted key, with the reason for it; `strategy.deepspeed` is laid over last."""
    found: Explained = dict(_batch(recipe, world_size))
    found.update(_loop(recipe))
    found.update(_types(recipe, precision))
    found.update(_zero(recipe, world_size, device))
    if "nvme" in (recipe.strategy.offload.optimizer, recipe.strategy.offload.params):
        found.update(_aio())
    laid_over = dotted(recipe.strategy.deepspeed)
    found.update({key: (value, "strategy.deepspeed") for key, value in laid_over.items() if value != {}})
    return found


def settings(recipe: Recipe, plan: Plan) -> Explained:
    """The configuration of a planned job; auto precision is bf16 on a GPU and fp32 without one."""
    device: Device = "cpu" if recipe.cluster.accelerator == "cpu" else "cuda"
    return explain(recipe, world_size=plan.world_size, device=device, precision=planned_precision(recipe)[0])


def problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with `strategy.deepspeed`, and what DeepSpeed cannot do with the keys that have types here."""
    from launcher.strategy.deepspeed_keys import check_overlay

    yield from check_overlay(recipe)
    strategy = recipe.strategy
    if not strategy.kind.startswith("zero"):
        return
    size = strategy.zero.allgather_bucket_size
    if size is not None and size % 2:
        yield Problem("strategy.zero.allgather_bucket_size", size, "an even number of elements", f"Write {size + 1}.")
    if recipe.model.dtype == "bf16" and strategy.offload.optimizer != "none":
        yield Problem(
            "model.dtype", "bf16", "fp32 with an offloaded update, whose master copies DeepSpeed keeps in fp32",
            "Write fp32.", because=("strategy.kind", "strategy.offload.optimizer"),
        )  # fmt: skip


def _batch(recipe: Recipe, world_size: int) -> Iterator[tuple[str, tuple[Any, str]]]:
    train, micro = recipe.train, recipe.train.micro_batch_size
    steps = accumulation_steps(
        global_batch_size=train.global_batch_size, micro_batch_size=micro, world_size=world_size
    )  # fmt: skip
    whole = f"{micro} x {steps} x {world_size} ranks"
    if empty := micro * steps * world_size - train.global_batch_size:
        whole += f": {train.global_batch_size} rows (train.global_batch_size), padded with {empty} of weight 0"
    yield "train_batch_size", (micro * steps * world_size, whole)
    yield "train_micro_batch_size_per_gpu", (micro, "train.micro_batch_size, rows of one forward")
    yield "gradient_accumulation_steps", (steps, f"{train.global_batch_size} rows / ({micro} x {world_size} ranks)")


def _loop(recipe: Recipe) -> Iterator[tuple[str, tuple[Any, str]]]:
    norm = recipe.train.max_grad_norm
    yield "gradient_clipping", (norm or 0.0, "train.max_grad_norm" if norm else "train.max_grad_norm is null: never")
    yield "zero_allow_untested_optimizer", (True, "the optimizer is made by the trainer and handed over")
    yield (
        "zero_force_ds_cpu_optimizer",
        (False, "that optimizer also updates what is offloaded; nothing is compiled here"),
    )
    yield "steps_per_print", (NEVER, "the trainer writes the figures")
    yield "wall_clock_breakdown", (False, "its timers make the host wait for the device in each step")
    yield "timers.throughput.enabled", (False, "likewise; the trainer measures without waiting")


def _types(recipe: Recipe, precision: Type) -> Iterator[tuple[str, tuple[Any, str]]]:
    bare = recipe.model.dtype == "bf16"  # no fp32 master copies, as the recipe asks
    yield "communication_data_type", ("fp32", "gradients are reduced in fp32, whatever the arithmetic")
    kept = ("bf16", "model.dtype: weights and their gradients are kept in bf16") if bare else ("fp32", "sums of many")
    yield "data_types.grad_accum_dtype", kept
    yield "bf16.enabled", (precision == "bf16", f"the arithmetic is {precision}")
    if precision == "bf16":
        yield "bf16.bf16_master_weights_and_grads", (bare, f"model.dtype is {recipe.model.dtype}")
        yield "bf16.bf16_optimizer_states", (bare, f"model.dtype is {recipe.model.dtype}")
    yield "fp16.enabled", (precision == "fp16", f"the arithmetic is {precision}")
    if precision == "fp16":
        yield "fp16.loss_scale", (0, "0: the scale moves with the gradients")
        yield "fp16.initial_scale_power", (16, "it starts at 2^16")
        yield "fp16.loss_scale_window", (2000, "it doubles after so many finite steps")
        yield "fp16.hysteresis", (1, "it halves at the first overflow")
        yield "fp16.consecutive_hysteresis", (False, "as there is none")
        yield "fp16.min_loss_scale", (1, "below 1 fp16 is not the cause")


def _zero(recipe: Recipe, world_size: int, device: Device) -> Iterator[tuple[str, tuple[Any, str]]]:
    strategy, section = recipe.strategy, "zero_optimization"
    stage = int(strategy.kind[-1])
    yield f"{section}.stage", (stage, f"strategy.kind = {strategy.kind}")
    overlap, on = strategy.zero.overlap_comm, device == "cuda"
    if overlap == "auto":
        why = "a second stream reduces while the backward pass goes on" if on else "there are no streams on a CPU"
        yield f"{section}.overlap_comm", (on, f"auto: {why}")
    else:
        yield f"{section}.overlap_comm", (overlap, "strategy.zero.overlap_comm")
    yield f"{section}.contiguous_gradients", (True, "gradients are copied into one buffer: no fragments")
    yield f"{section}.reduce_scatter", (True, "each rank gets its share of the sum only")
    known = _hidden(recipe)
    sizes = zero_sizes(
        recipe, known or ASSUMED_HIDDEN, "" if known else ", assumed: the architecture is not known here"
    )
    for key, at, stages in _SIZES:
        if stage in stages:
            yield f"{section}.{key}", sizes[at]
    if stage < 3:
        yield f"{section}.round_robin_gradients", (False, "parameters keep their order in the flat buffers")
    else:
        yield from _stage3(recipe)
    yield from _offload(recipe, world_size, device)


_SIZES = (  # DeepSpeed's key, ours, the stages that read it
    ("reduce_bucket_size", "reduce_bucket_size", (1, 2, 3)),
    ("allgather_bucket_size", "allgather_bucket_size", (1, 2)),
    ("stage3_prefetch_bucket_size", "prefetch_bucket_size", (3,)),
    ("stage3_param_persistence_threshold", "param_persistence_threshold", (3,)),
    ("stage3_max_live_parameters", "max_live_parameters", (3,)),
    ("stage3_max_reuse_distance", "max_live_parameters", (3,)),
    ("sub_group_size", "sub_group_size", (3,)),
)


def _stage3(recipe: Recipe) -> Iterator[tuple[str, tuple[Any, str]]]:
    section, zero = "zero_optimization", recipe.strategy.zero
    why = "the trainer's checkpoint and `launcher export` write weights from the shards"
    yield f"{section}.stage3_gather_16bit_weights_on_model_save", (False, why)
    why = "ranks that hold a second copy of the shards" if zero.hpz_partition_size > 1 else "no second copy"
    yield f"{section}.zero_hpz_partition_size", (zero.hpz_partition_size, f"strategy.zero.hpz_partition_size: {why}")
    yield f"{section}.zero_quantized_weights", (zero.quantized_weights, "strategy.zero.quantized_weights")
    yield f"{section}.zero_quantized_gradients", (zero.quantized_gradients, "strategy.zero.quantized_gradients")
    family = (_architecture(recipe) or {}).get("model_type", "")
    if zero.leaf_modules is not None:
        yield f"{section}.leaf_module.classes", (list(zero.leaf_modules), "strategy.zero.leaf_modules")
    elif family in MOE_BLOCKS:
        why = f"blocks of experts of {family} are gathered whole: which expert runs changes with the data"
        yield f"{section}.leaf_module.classes", ([MOE_BLOCKS[family]], why)


def _offload(recipe: Recipe, world_size: int, device: Device) -> Iterator[tuple[str, tuple[Any, str]]]:
    offload, pinned = recipe.strategy.offload, device == "cuda"
    why = "page-locked memory is copied at full speed beside the arithmetic" if pinned else "there is no GPU to copy to"
    for name, place in (("optimizer", offload.optimizer), ("params", offload.params)):
        if place == "none":
            continue
        section = f"zero_optimization.offload_{name.removesuffix('s')}"
        yield f"{section}.device", (place, f"strategy.offload.{name}")
        yield f"{section}.pin_memory", (pinned, why)
        if place == "nvme":
            yield f"{section}.nvme_path", (offload.nvme_path, "strategy.offload.nvme_path")
            yield from _buffers(recipe, name, section, world_size)


def _buffers(recipe: Recipe, name: str, section: str, world_size: int) -> Iterator[tuple[str, tuple[Any, str]]]:
    if name == "optimizer":
        yield f"{section}.buffer_count", (4, "weight, gradient and two moments")
        return
    found = weights(architecture) if (architecture := _architecture(recipe)) else None
    known = max((math.prod(w.shape) for w in found), default=0) if found else 0
    largest = known or ASSUMED_LARGEST
    part = math.ceil(-(-largest // world_size) / 1024) * 1024
    why = f"the largest weight, {largest} elements{'' if known else ', assumed'}, over {world_size} ranks"
    yield f"{section}.buffer_count", (5, "DeepSpeed's default: weights on their way at a time")
    yield f"{section}.buffer_size", (part, why)


def _aio() -> Iterator[tuple[str, tuple[Any, str]]]:
    tune = "DeepSpeed's default; `ds_nvme_tune` measures what this disk likes"
    yield "aio.block_size", (1048576, tune)
    yield "aio.queue_depth", (8, tune)
    yield "aio.intra_op_parallelism", (1, tune)
    yield "aio.single_submit", (False, tune)
    yield "aio.overlap_events", (True, tune)


def _architecture(recipe: Recipe) -> Any:
    model = recipe.model
    if model.name is None and model.config is None:
        return None
    return read_config(model.name, model.config, model.revision)[0]


def _hidden(recipe: Recipe) -> int | None:
    """Hidden size of the (text) model, where its config.json is at hand."""
    architecture = _architecture(recipe) or {}
    text = architecture.get("text_config") or architecture
    size = next((text[key] for key in ("hidden_size", "n_embd", "d_model") if text.get(key)), None)
    return int(size) if size is not None else None
