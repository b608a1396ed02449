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
    "assistant_only_loss": "data.train_on",
    "attn_implementation": "model.attention",
    "batch_size": "train.global_batch_size",
    "bf16": "train.precision (bf16)",
    "buffer_size": "data.shuffle_buffer",
    "custom_dataset_info": "data.train (path: dataset_info.json#NAME)",
    "cutoff_len": "data.seq_len",
    "dataset": "data.train",
    "dataset_dir": "data.train (path: DIR/dataset_info.json#NAME)",
    "dataset_num_proc": "data.num_workers",
    "dataset_prepared_path": "data.cache_dir",
    "dataset_processes": "data.num_workers",
    "dataset_text_field": "data.train.0.columns (as {text: FIELD})",
    "datasets": "data.train",
    "deepspeed_config": "strategy.deepspeed",
    "eval_dataset": "data.eval",
    "excess_length_strategy": "data.overlong",
    "flash_attn": "model.attention",
    "fp16": "train.precision (fp16)",
    "gpus": "cluster.nproc_per_node",
    "gpus_per_node": "cluster.nproc_per_node",
    "grad_clip": "train.max_grad_norm",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation follows from it)",
    "hub_model_id": "model.name",
    "interleave_prob": "data.train.0.weight",
    "interleave_probs": "data.train.0.weight",
    "learning_rate": "optimizer.lr",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_target_modules": "adapter.targets",
    "loss_scale": "data.train_on (a message's own weight: its key weight)",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "mask_history": "data.train_on (last_assistant)",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "mix_strategy": "data.mix.until",
    "model_name_or_path": "model.name",
    "neat_packing": "data.packing",
    "num_gpus": "cluster.nproc_per_node",
    "num_nodes": "cluster.nodes",
    "num_train_epochs": "train.epochs",
    "offload_optimizer": "strategy.offload.optimizer",
    "offload_param": "strategy.offload.params",
    "output_dir": "run.dir",
    "packing_strategy": "data.packing",
    "peft": "adapter.kind",
    "per_device_train_batch_size": "train.micro_batch_size",
    "preprocessing_num_workers": "data.num_workers",
    "pretraining_dataset": "data.train (with data.streaming)",
    "report_to": "logging.trackers",
    "roles_to_train": "data.train_roles",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_len": "data.seq_len",
    "sharding_strategy": "strategy.kind",
    "shuffle_buffer_size": "data.shuffle_buffer",
    "split_dataset_ratio": "data.eval_fraction",
    "stopping_strategy": "data.mix.until",
    "target_modules": "adapter.targets",
    "task": "objective.kind",
    "template": "data.chat_template",
    "test_datasets": "data.eval",
    "tokenized_path": "data.cache_dir",
    "torch_compile": "model.compile",
    "torch_dtype": "model.dtype",
    "train_on_eos": "data.train_end_of_turn",
    "train_on_inputs": "data.train_on (all)",
    "train_on_prompt": "data.train_on (all)",
    "truncation_strategy": "data.overlong",
    "use_liger_kernel": "model.liger",
    "val_dataset": "data.eval",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
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
    elif close := difflib.get_close_matches(name, [full.rpartition(".")[2] for full in known_keys()], n=1, cutoff=0.8):
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
