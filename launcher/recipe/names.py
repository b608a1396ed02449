"""Which key was probably meant when nobody knows the one that was written."""

from __future__ import annotations

import difflib
import typing
from dataclasses import fields, is_dataclass
from functools import cache

from launcher.recipe.schema import Recipe

# names that other trainers use -> ours, for those that no similarity of letters finds
_ELSEWHERE = {
    "accumulate_grad_batches": "train.global_batch_size (accumulation follows from it)",
    "activation_checkpointing": "model.gradient_checkpointing",
    "attn_implementation": "model.attention",
    "batch_size": "train.global_batch_size",
    "bf16": "train.precision (bf16)",
    "cutoff_len": "data.seq_len",
    "dataset": "data.train",
    "datasets": "data.train",
    "deepspeed_config": "strategy.deepspeed",
    "flash_attn": "model.attention",
    "fp16": "train.precision (fp16)",
    "gpus": "cluster.nproc_per_node",
    "gpus_per_node": "cluster.nproc_per_node",
    "grad_clip": "train.max_grad_norm",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from it)",
    "hub_model_id": "model.name",
    "learning_rate": "optimizer.lr",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_target_modules": "adapter.targets",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "model_name_or_path": "model.name",
    "num_gpus": "cluster.nproc_per_node",
    "num_nodes": "cluster.nodes",
    "num_train_epochs": "train.epochs",
    "offload_optimizer": "strategy.offload.optimizer",
    "offload_param": "strategy.offload.params",
    "output_dir": "run.dir",
    "peft": "adapter.kind",
    "per_device_train_batch_size": "train.micro_batch_size",
    "report_to": "logging.trackers",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_len": "data.seq_len",
    "sharding_strategy": "strategy.kind",
    "target_modules": "adapter.targets",
    "task": "objective.kind",
    "torch_compile": "model.compile",
    "torch_dtype": "model.dtype",
    "use_liger_kernel": "model.liger",
    "val_set_size": "data.eval_fraction",
    "zero_hpz_partition_size": "strategy.zero.hpz_partition_size",
    "zero_stage": "strategy.kind",
}


def meant(key: str, allowed: list[str]) -> str:
    """The nearest key, with a remark where one is needed: in this section, by name in another, then by likeness.

    key: the dotted key nobody knows; allowed: names that its mapping knows. Empty when nothing is near.
    """
    name = key.rpartition(".")[2]
    elsewhere = [full for full in known_keys() if full.rpartition(".")[2] == name]
    if name in _ELSEWHERE:
        found = _ELSEWHERE[name]
    elif close := difflib.get_close_matches(name, allowed, n=1, cutoff=0.75):
        found = f"{key.rpartition('.')[0]}.{close[0]}".lstrip(".")
    elif elsewhere:
        found = elsewhere[0]
    elif close := difflib.get_close_matches(name, allowed, n=1, cutoff=0.55):
        found = f"{key.rpartition('.')[0]}.{close[0]}".lstrip(".")
    elif close := difflib.get_close_matches(name, [full.rpartition(".")[2] for full in known_keys()], n=1, cutoff=0.7):
        found = next(full for full in known_keys() if full.rpartition(".")[2] == close[0])
    else:
        return ""
    return found


@cache
def known_keys() -> list[str]:
    """Every dotted key of a recipe, shallow ones first."""
    found: list[str] = []
    _collect(Recipe, "", found)
    return sorted(found, key=lambda key: key.count("."))


def _collect(cls: type, prefix: str, found: list[str]) -> None:
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        found.append(prefix + f.name)
        hint = hints[f.name]
        if is_dataclass(hint):
            _collect(typing.cast(type, hint), f"{prefix}{f.name}.", found)
        elif typing.get_origin(hint) is list and is_dataclass(typing.get_args(hint)[0]):
            _collect(typing.get_args(hint)[0], f"{prefix}{f.name}.0.", found)
