"""What may be written into `strategy.deepspeed`: keys that DeepSpeed reads, and that nothing here decides already.

`deepspeed_keys.json` lists every key of the supported DeepSpeed with its type; `python -m
launcher.strategy._deepspeed_keys` makes it, and a test compares it with the installed version.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from launcher.errors import Problem, nearest
from launcher.recipe.schema import Recipe

_LOSS = "the trainer scales the loss so that gradients averaged over the ranks are the mean over tokens"
_PARALLEL = "the trainer is data parallel alone"
_OPTIMIZER = "the trainer makes the optimizer and hands it over"
_SCALE = (
    "the loss scale moves by the trainer's own rule: from 2^16, halved at an overflow, doubled after 2000 good steps"
)
_MASTERS = "fp32 master copies follow from model.dtype and train.precision"
_FINITE = "the trainer drops and counts each update whose gradient is not finite"
_UNREAD = "DeepSpeed 0.19 takes the key and reads it nowhere"
_MAKES_MODEL = "it is for models made inside deepspeed.zero.Init; the trainer makes the model and then shards it"
_CHECKPOINT = "the trainer writes and reads checkpoints of its own, of fp32 masters and both moments"

# Keys of DeepSpeed that a recipe says elsewhere -> with which key. A section stands for all that is in it.
SAID_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "fp16.enabled": "train.precision",
    "fp16.auto_cast": "train.precision",
    "bf16.enabled": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.param_dtype": "train.precision",
    "optimizer": "the section optimizer",
    "scheduler": "optimizer.schedule",
    "activation_checkpointing": "model.gradient_checkpointing",
    "compile": "model.compile",
    "checkpoint": "the section checkpoint",
    "data_efficiency": "the section data",
    "dataloader_drop_last": "the section data",
    "zero_optimization.stage": "strategy.kind",
    "zero_optimization.offload_optimizer.device": "strategy.offload.optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "strategy.offload.nvme_path",
    "zero_optimization.offload_param.device": "strategy.offload.params",
    "zero_optimization.offload_param.nvme_path": "strategy.offload.nvme_path",
    "zero_optimization.cpu_offload": "strategy.offload.optimizer",
    "zero_optimization.cpu_offload_param": "strategy.offload.params",
    "zero_optimization.reduce_bucket_size": "strategy.zero.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "strategy.zero.allgather_bucket_size",
    "zero_optimization.overlap_comm": "strategy.zero.overlap_comm",
    "zero_optimization.stage3_param_persistence_threshold": "strategy.zero.param_persistence_threshold",
    "zero_optimization.param_persistence_threshold": "strategy.zero.param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size": "strategy.zero.prefetch_bucket_size",
    "zero_optimization.prefetch_bucket_size": "strategy.zero.prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters": "strategy.zero.max_live_parameters",
    "zero_optimization.max_live_parameters": "strategy.zero.max_live_parameters",
    "zero_optimization.sub_group_size": "strategy.zero.sub_group_size",
    "zero_optimization.zero_hpz_partition_size": "strategy.zero.hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "strategy.zero.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "strategy.zero.quantized_gradients",
    "zero_optimization.leaf_module.classes": "strategy.zero.leaf_modules",
}

# Keys of DeepSpeed that would work against the trainer -> why.
REFUSED = {
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "managed_gradient_accumulation": _LOSS,
    "gradient_allreduce_op": _LOSS,
    "prescale_gradients": _LOSS,
    "gradient_predivide_factor": _LOSS,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "pipeline": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    **{
        f"fp16.{key}": _SCALE
        for key in (
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        )
    },
    "fp16.fp16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_master_weights_and_grads": _MASTERS,
    "bf16.bf16_optimizer_states": _MASTERS,
    "bf16.check_grad_overflow": _FINITE,
    "bf16.immediate_grad_update": "it is read by an optimizer of DeepSpeed that is not used here",
    "disable_allgather": _UNREAD,
    "hybrid_engine": "it generates text between steps, which the trainer does not",
    "weight_quantization": "it is read for inference alone",
    "autotuning": "it starts runs of its own; vary the keys of the recipe instead",
    "datastates_ckpt": _CHECKPOINT,
    "vocabulary_size": "the model says it",
    "comet.api_key": "a secret never stands in a recipe: export COMET_API_KEY and name it in cluster.env",
    "zero_optimization.allgather_partitions": _UNREAD,
    "zero_optimization.memory_efficient_linear": _MAKES_MODEL,
    "zero_optimization.override_module_apply": _MAKES_MODEL,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.compute_grad_norm": "the trainer reports the norm and clips by it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OPTIMIZER,
    "zero_optimization.zenflow": "updates would come a step late, and loss would differ from the other strategies",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen weights in 8 bit would not be those of the model",
    "zero_optimization.offload_optimizer.super_offload": _CHECKPOINT + "; its state lies elsewhere",
    "zero_optimization.offload_optimizer.ratio": _CHECKPOINT + "; with a part of it on the GPU it lies elsewhere",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it is read with super_offload alone",
}

# Keys that DeepSpeed reads in some stages only -> in which strategies.
_STAGES_12, _STAGE_3 = ("zero1", "zero2"), ("zero3",)
READ_IN = {
    f"zero_optimization.{key}": kinds
    for kinds, keys in {
        _STAGES_12: (
            "ignore_unused_parameters", "parameter_alignment", "round_robin_gradients",
            "use_multi_rank_bucket_allreduce",
        ),
        _STAGE_3: (
            "allgather_sequential", "enable_sanity_checks", "leaf_module", "log_trace_cache_warnings",
            "max_reuse_distance", "model_persistence_threshold", "module_granularity_threshold",
            "stage3_allgather_sequential", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
            "use_all_reduce_for_fetch_params",
        ),
    }.items()
    for key in keys
}  # fmt: skip

_STATES = {
    "zero_optimization.offload_optimizer": "optimizer",
    "zero_optimization.offload_param": "params",
    "aio": "",
}


def check_overlay(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with `strategy.deepspeed`: keys unknown to DeepSpeed, wrong types, contradictions of the recipe."""
    if recipe.strategy.deepspeed and recipe.strategy.kind.startswith("zero"):  # any other is refused by its section
        yield from _section(recipe, recipe.strategy.deepspeed, known()["keys"], "")


@functools.cache
def known() -> Any:
    """The snapshot: {"deepspeed": version, "keys": {...}}."""
    return json.loads(resources.files("launcher.strategy").joinpath("deepspeed_keys.json").read_text())


def _section(recipe: Recipe, given: Mapping[str, Any], keys: Mapping[str, Any], prefix: str) -> Iterator[Problem]:
    for name, value in given.items():
        key = f"{prefix}{name}"
        at = f"strategy.deepspeed.{key}"
        if name not in keys:
            fix = nearest(str(name), keys) or "Remove the key."
            yield Problem(at, _shown(value), f"a key that DeepSpeed {known()['deepspeed']} reads", fix)
        elif "removed" in keys[name]:
            yield Problem(at, _shown(value), f"no such key: {keys[name]['removed']}", "Remove the key.")
        elif (problem := _contradiction(recipe, key, value)) is not None:
            yield problem
        elif "deprecated" in keys[name]:
            yield Problem(at, _shown(value), f"{keys[name]['deprecated']} in its place: DeepSpeed has renamed it")
        elif "keys" not in keys[name]:
            yield from _leaf(at, value, keys[name])
        elif isinstance(value, Mapping):
            yield from _section(recipe, value, keys[name]["keys"], f"{key}.")
        else:
            yield Problem(at, value, f"a section with keys such as {', '.join(list(keys[name]['keys'])[:3])}")


def _contradiction(recipe: Recipe, key: str, value: Any) -> Problem | None:
    at = f"strategy.deepspeed.{key}"
    if key in SAID_BY:
        return Problem(at, _shown(value), f"nothing here: {SAID_BY[key]} says it", f"Use {SAID_BY[key]}.")
    if key in REFUSED:
        return Problem(at, _shown(value), f"nothing here: {REFUSED[key]}", "Remove the key.")
    if (kinds := READ_IN.get(key)) and recipe.strategy.kind not in kinds:
        expected = f"nothing here with strategy.kind={recipe.strategy.kind}: {' and '.join(kinds)} alone read it"
        return Problem(at, _shown(value), expected, "Remove the key.", "", ("strategy.kind",))
    offload = recipe.strategy.offload
    if key in _STATES:
        which = _STATES[key]
        used = getattr(offload, which) != "none" if which else "nvme" in (offload.optimizer, offload.params)
        if not used:
            setting = f"strategy.offload.{which}=cpu" if which else "strategy.offload.optimizer=nvme"
            because = ("strategy.offload.optimizer", "strategy.offload.params")
            return Problem(
                at, _shown(value), "nothing while nothing is offloaded to it", f"Set {setting}.", "", because
            )
    return None


def _leaf(at: str, value: Any, leaf: Mapping[str, Any]) -> Iterator[Problem]:
    types, choices = leaf.get("type"), leaf.get("choices")
    if types and not any(_is(value, name) for name in types):
        yield Problem(at, value, " or ".join(_WORDS[name] for name in types))
    elif choices and value not in choices and not (value is None and "null" in (types or ())):
        yield Problem(at, value, f"one of {', '.join(map(str, choices))}", nearest(str(value), map(str, choices)))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if "min" in leaf and value < leaf["min"]:
            yield Problem(at, value, f"{leaf['min']} or more")
        if "above" in leaf and value <= leaf["above"]:
            yield Problem(at, value, f"a number above {leaf['above']}")
        if "max" in leaf and value > leaf["max"]:
            yield Problem(at, value, f"{leaf['max']} or less")


_WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "list": "a list",
    "dict": "a section", "null": "null",
}  # fmt: skip


def _is(value: Any, name: str) -> bool:
    """JSON's types: true is no number, and 5e8 is a whole one."""
    if name == "null":
        return value is None
    if name == "bool":
        return isinstance(value, bool)
    if name in ("int", "float"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (name == "float" or float(value).is_integer())
    return isinstance(value, {"str": str, "list": list, "dict": Mapping}[name])  # type: ignore[arg-type]


def _shown(value: Any) -> Any:
    return "{...}" if isinstance(value, Mapping) and value else value
