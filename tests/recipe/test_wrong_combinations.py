"""Choices that do not go together: each is refused before anything starts, as one problem with the way out."""

from __future__ import annotations

import importlib.util
import json
import typing
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import Problem, RecipeError
from launcher.recipe.names import known_keys
from launcher.recipe.rules.together import LIGER_MODELS
from launcher.recipe.schema import Strategy
from launcher.recipe.schema.strategy import _PLACES, _READ_BY
from tests.recipe.make import GOOD, loaded, write

TWO_NODES = ["cluster.nodes=2", "cluster.nproc_per_node=8", "train.global_batch_size=16"]
NODE8 = ["cluster.nproc_per_node=8"]
FP16_LINKS = "strategy.deepspeed.communication_data_type=fp16"
CPU = ["cluster.accelerator=cpu"]
TIED = "model={config: {model_type: gpt_bigcode, tie_word_embeddings: true}, tokenizer: a/b}"


def zero(number: int, *rest: str) -> list[str]:
    return [f"strategy.kind=zero{number}", *rest]


# what is chosen (the last is at fault unless the key says otherwise), the key complained of, parts of the complaint
CASES: dict[str, tuple[list[str], str, list[str]]] = {
    # offload
    "offload with ddp": (
        ["strategy.kind=ddp", "strategy.offload.optimizer=cpu"],
        "strategy.offload.optimizer",
        ["expected none with ddp, which keeps whole copies in GPU memory", "Use strategy.kind=fsdp2."],
    ),
    "weights of ddp to nvme": (
        ["strategy.kind=ddp", "strategy.offload={params: nvme, nvme_path: /x}"],
        "strategy.offload.params",
        ["expected none with ddp", "Use strategy.kind=zero3."],
    ),
    "weights of zero1 to the host": (
        zero(1, "strategy.offload.params=cpu"),
        "strategy.offload.params",
        ["expected none with zero1, which keeps the weights whole on each rank", "Use strategy.kind=zero3."],
    ),
    "weights of zero2 to the host": (
        zero(2, "strategy.offload={optimizer: cpu, params: cpu}"),
        "strategy.offload.params",
        ["expected none with zero2, which keeps the weights whole on each rank"],
    ),
    "half of fsdp2's state to the host": (
        ["strategy.offload.params=cpu"],
        "strategy.offload.optimizer",
        ["none: expected cpu, as offload.params", "set both to cpu, or both to none"],
    ),
    "moments of fsdp2 alone to the host": (
        ["strategy.offload.optimizer=cpu"],
        "strategy.offload.optimizer",
        ["cpu: expected none, as offload.params"],
    ),
    "fsdp2 to nvme": (
        ["strategy.offload={optimizer: nvme, nvme_path: /x}"],
        "strategy.offload.optimizer",
        ["nvme: expected none or cpu with fsdp2, which cannot use nvme", "Use strategy.kind=zero3."],
    ),
    "zero1 to nvme": (
        zero(1, "strategy.offload={optimizer: nvme, nvme_path: /x}"),
        "strategy.offload.optimizer",
        ["expected none or cpu with zero1"],
    ),
    "zero2 to nvme": (
        zero(2, "strategy.offload={optimizer: nvme, nvme_path: /x}"),
        "strategy.offload.optimizer",
        ["expected none or cpu with zero2", "Use strategy.kind=zero3."],
    ),
    "nvme without a path": (
        zero(3, "strategy.offload.optimizer=nvme"),
        "strategy.offload.nvme_path",
        ["null: expected a folder on each node's local disk, because offload.optimizer = nvme", "/local_nvme"],
    ),
    "nvme of weights without a path": (
        zero(3, "strategy.offload.params=nvme"),
        "strategy.offload.nvme_path",
        ["because offload.params = nvme"],
    ),
    "path without nvme": (
        zero(3, "strategy.offload={optimizer: cpu, nvme_path: /x}"),
        "strategy.offload.nvme_path",
        ["/x: expected null: nothing is offloaded to nvme", "offload.optimizer=nvme"],
    ),
    "path of fsdp2, which has no nvme": (
        ["strategy.offload.nvme_path=/x"],
        "strategy.offload.nvme_path",
        ["expected null"],
    ),
    "nvme below wherever the job starts": (
        zero(3, "strategy.offload={optimizer: nvme, nvme_path: swap}"),
        "strategy.offload.nvme_path",
        ["swap: expected an absolute path"],
    ),
    # keys of another strategy
    "bucket of ZeRO with fsdp2": (
        ["strategy.zero.reduce_bucket_size=1000"],
        "strategy.zero.reduce_bucket_size",
        ["1000: expected null (the default) with fsdp2: only zero1, zero2, zero3 read it", "Remove the key"],
    ),
    "overlap of ZeRO with ddp": (
        ["strategy.kind=ddp", "strategy.zero.overlap_comm=true"],
        "strategy.zero.overlap_comm",
        ["true: expected auto (the default) with ddp"],
    ),
    "gathering bucket with zero3": (
        zero(3, "strategy.zero.allgather_bucket_size=1000"),
        "strategy.zero.allgather_bucket_size",
        ["with zero3: only zero1, zero2 read it", "strategy.kind=zero2"],
    ),
    "persistence with zero2": (
        zero(2, "strategy.zero.param_persistence_threshold=10"),
        "strategy.zero.param_persistence_threshold",
        ["with zero2: only zero3 reads it", "strategy.kind=zero3"],
    ),
    "prefetch bucket with zero1": (
        zero(1, "strategy.zero.prefetch_bucket_size=10"),
        "strategy.zero.prefetch_bucket_size",
        ["only zero3 reads it"],
    ),
    "live parameters with zero2": (
        zero(2, "strategy.zero.max_live_parameters=10"),
        "strategy.zero.max_live_parameters",
        ["only zero3 reads it"],
    ),
    "sub-groups with zero2": (zero(2, "strategy.zero.sub_group_size=10"), "strategy.zero.sub_group_size", ["zero3"]),
    "ZeRO++ copies with zero2": (
        [*NODE8, *zero(2, "strategy.zero.hpz_partition_size=8")],
        "strategy.zero.hpz_partition_size",
        ["8: expected 1 (the default) with zero2: only zero3 reads it"],
    ),
    "ZeRO++ weights with fsdp2": (
        ["strategy.zero.quantized_weights=true"],
        "strategy.zero.quantized_weights",
        ["true: expected false (the default) with fsdp2: only zero3 reads it"],
    ),
    "ZeRO++ gradients with zero1": (
        [*TWO_NODES, FP16_LINKS, *zero(1, "strategy.zero.quantized_gradients=true")],
        "strategy.zero.quantized_gradients",
        ["only zero3 reads it"],
    ),
    "leaf modules with zero1": (
        zero(1, "strategy.zero.leaf_modules=[Experts]"),
        "strategy.zero.leaf_modules",
        ["[Experts]: expected null (the default) with zero1"],
    ),
    "resharding with zero3": (
        zero(3, "strategy.reshard_after_forward=false"),
        "strategy.reshard_after_forward",
        ["false: expected true (the default) with zero3: only fsdp2 reads it"],
    ),
    "resharding with ddp": (
        ["strategy.kind=ddp", "strategy.reshard_after_forward=false"],
        "strategy.reshard_after_forward",
        ["with ddp: only fsdp2 reads it"],
    ),
    "prefetched blocks with zero3": (zero(3, "strategy.prefetch=2"), "strategy.prefetch", ["only fsdp2 reads it"]),
    "DeepSpeed's keys with fsdp2": (["strategy.deepspeed={dump_state: true}"], "strategy.deepspeed", ["fsdp2: only"]),
    # DeepSpeed's own keys
    "key that DeepSpeed does not know": (
        zero(2, "strategy.deepspeed={zero_optimization: {round_robin_gradient: true}}"),
        "strategy.deepspeed.zero_optimization.round_robin_gradient",
        ["Did you mean 'round_robin_gradients'?"],
    ),
    "batch said twice": (
        zero(2, "strategy.deepspeed={train_batch_size: 8}"),
        "strategy.deepspeed.train_batch_size",
        ["train.global_batch_size"],
    ),
    "clipping said twice": (
        zero(2, "strategy.deepspeed={gradient_clipping: 1.0}"),
        "strategy.deepspeed.gradient_clipping",
        ["train.max_grad_norm"],
    ),
    "stage said twice": (
        zero(2, "strategy.deepspeed={zero_optimization: {stage: 3}}"),
        "strategy.deepspeed.zero_optimization.stage",
        ["strategy.kind"],
    ),
    "DeepSpeed's optimizer": (
        zero(1, "strategy.deepspeed={optimizer: {type: Adam}}"),
        "strategy.deepspeed.optimizer",
        ["optimizer"],
    ),
    "DeepSpeed's schedule": (
        zero(1, "strategy.deepspeed={scheduler: {type: WarmupLR}}"),
        "strategy.deepspeed.scheduler",
        ["optimizer.schedule"],
    ),
    # mesh and groups
    "copies of ZeRO": (
        [*NODE8, *zero(3, "strategy.replicate=2")],
        "strategy.replicate",
        ["2: expected null with zero3, which shards over all ranks", "Use strategy.kind=fsdp2"],
    ),
    "shards of ZeRO": ([*NODE8, *zero(2, "strategy.shard=4")], "strategy.shard", ["4: expected null with zero2"]),
    "shards of ddp": ([*NODE8, "strategy.kind=ddp", "strategy.shard=8"], "strategy.shard", ["1 or null with ddp"]),
    "copies of ddp that are not all ranks": (
        [*NODE8, "strategy.kind=ddp", "strategy.replicate=4"],
        "strategy.replicate",
        ["null or the world size 8"],
    ),
    "HSDP that does not multiply": (
        [*NODE8, "strategy.shard=4", "strategy.replicate=4"],
        "strategy.replicate",
        ["4: expected 2, so that replicate x shard is the world size 8"],
    ),
    "shards that do not divide": ([*NODE8, "strategy.shard=3"], "strategy.shard", ["a divisor of", "Use 2 or 4."]),
    "resharding to groups of one": (
        [*NODE8, "strategy.reshard_after_forward=1"],
        "strategy.reshard_after_forward",
        ["1: expected true, false, or a group of 2 ranks or more", "Write false"],
    ),
    "resharding to groups that do not divide": (
        [*NODE8, "strategy.reshard_after_forward=3"],
        "strategy.reshard_after_forward",
        ["3: expected a divisor of the 8 ranks that share a copy", "Use 2 or 4"],
    ),
    "resharding to groups beyond the shard": (
        [*NODE8, "strategy.shard=2", "strategy.reshard_after_forward=4"],
        "strategy.reshard_after_forward",
        ["4: expected a divisor of the 2 ranks that share a copy"],
    ),
    "no block to prefetch": (["strategy.prefetch=0"], "strategy.prefetch", ["0: expected 1 block or more, or null"]),
    "second copies that do not divide": (
        [*NODE8, *zero(3, "strategy.zero.hpz_partition_size=3")],
        "strategy.zero.hpz_partition_size",
        ["3: expected a divisor of the world size 8 (1 node x 8)", "Use 8, the ranks of a node."],
    ),
    "second copies that straddle nodes": (
        ["cluster.nodes=2", "cluster.nproc_per_node=6", "train.global_batch_size=12",
         *zero(3, "strategy.zero.hpz_partition_size=4")],
        "strategy.zero.hpz_partition_size",
        ["that does not straddle nodes", "Use 6"],
    ),
    "second copies of one rank": (
        zero(3, "strategy.zero.hpz_partition_size=2"),
        "strategy.zero.hpz_partition_size",
        ["Use 1, which means no second copy."],
    ),
    "no second copies": (
        zero(3, "strategy.zero.hpz_partition_size=0"),
        "strategy.zero.hpz_partition_size",
        ["0: expected 1 or more, where 1 means no second copy"],
    ),
    "empty bucket": (
        zero(2, "strategy.zero.reduce_bucket_size=0"),
        "strategy.zero.reduce_bucket_size",
        ["0: expected 1 or more, or null"],
    ),
    "leaf modules without a name": (
        zero(3, "strategy.zero.leaf_modules=[]"),
        "strategy.zero.leaf_modules",
        ["[]: expected names of classes, or null"],
    ),
    # precision
    "bf16 weights, fp32 arithmetic": (
        ["model.dtype=bf16", "train.precision=fp32"],
        "train.precision",
        ["fp32: expected auto or bf16 with model.dtype = bf16", "model.dtype=fp32"],
    ),
    "bf16 weights, fp16 arithmetic": (["model.dtype=bf16", "train.precision=fp16"], "train.precision", ["or bf16"]),
    "bf16 weights with an offloaded update of ZeRO": (
        zero(2, "strategy.offload.optimizer=cpu", "model.dtype=bf16"),
        "model.dtype",
        ["bf16: expected fp32", "Write fp32."],
    ),
    "bf16 weights and adapters of ZeRO": (
        zero(2, "adapter.kind=lora", "model.dtype=bf16"),
        "model.dtype",
        ["bf16: expected fp32 with adapters and zero2", "Write fp32: with train.precision=bf16"],
    ),
    "gradients in 4 bit that do not travel in fp16": (
        [*TWO_NODES, *zero(3, "strategy.zero.quantized_gradients=true")],
        "strategy.zero.quantized_gradients",
        ["true: expected false unless gradients travel in fp16", "strategy.deepspeed.communication_data_type=fp16"],
    ),
    "gradients in 4 bit inside a node": (
        [*NODE8, FP16_LINKS, *zero(3, "strategy.zero.quantized_gradients=true")],
        "strategy.zero.quantized_gradients",
        ["expected false on one node"],
    ),
    "flash attention in fp32": (
        ["train.precision=fp32", "model.attention=flash_attention_2"],
        "model.attention",
        ["expected auto, flex, sdpa or eager with train.precision = fp32", "train.precision=bf16"],
    ),
    "varlen attention in fp32": (["train.precision=fp32", "model.attention=varlen"], "model.attention", ["half"]),
    # the CPU
    "fp16 on the CPU": ([*CPU, "train.precision=fp16"], "train.precision", ["on the CPU", "Write auto."]),
    "TF32 on the CPU": ([*CPU, "train.tf32=true"], "train.tf32", ["true: expected false on the CPU"]),
    "Liger on the CPU": ([*CPU, "model.liger=true"], "model.liger", ["its kernels need a GPU", "Write auto."]),
    "flash attention on the CPU": ([*CPU, "model.attention=flash_attention_3"], "model.attention", ["sdpa or eager"]),
    "GPU memory on the CPU": ([*CPU, "cluster.gpu_memory_gib=80"], "cluster.gpu_memory_gib", ["80.0: expected null"]),
    "overlap on the CPU": (
        [*CPU, *zero(2, "strategy.zero.overlap_comm=true")],
        "strategy.zero.overlap_comm",
        ["true: expected auto or false on the CPU, which has no streams"],
    ),
    "weights in 8 bit on the CPU": (
        [*CPU, *zero(3, "strategy.zero.quantized_weights=true")],
        "strategy.zero.quantized_weights",
        ["its kernels need a GPU"],
    ),
    # kernels
    "Liger for an architecture it does not know": (
        ["model={config: {model_type: gpt_bigcode}, tokenizer: a/b}", "model.liger=true"],
        "model.liger",
        ["true: expected auto or false: liger-kernel has nothing for model_type gpt_bigcode", "Write auto"],
    ),
    "compiled blocks of zero3": (
        zero(3, "model.compile=true"),
        "model.compile",
        ["true: expected false with zero3", "use strategy.kind=fsdp2"],
    ),
    "frozen weights of LoRA stored from nvme": (
        ["strategy=zero3-nvme", "adapter.kind=lora", "checkpoint.store_frozen=true"],
        "checkpoint.store_frozen",
        ["true: expected false with strategy.offload.params = nvme", "read from the base model again"],
    ),
    # adapters
    "rank without an adapter": (
        ["adapter.rank=8"],
        "adapter.rank",
        ["8: expected 16 (the default) with adapter.kind = full, which has no adapter", "adapter.kind=lora"],
    ),
    "alpha without an adapter": (["adapter.alpha=32"], "adapter.alpha", ["32.0: expected null (the default)"]),
    "dropout without an adapter": (["adapter.dropout=0.1"], "adapter.dropout", ["with adapter.kind = full"]),
    "targets without an adapter": (["adapter.targets=[q_proj]"], "adapter.targets", ["[all-linear] (the default)"]),
    "adapter of nothing": (["adapter.kind=lora", "adapter.targets=[]"], "adapter.targets", ["names of layers"]),
    "adapter of rank 0": (["adapter.kind=lora", "adapter.rank=0"], "adapter.rank", ["0: expected 1 or more"]),
    "adapter of a tied output layer": (
        [TIED, "adapter.kind=lora", "adapter.targets=[c_attn, lm_head]"],
        "adapter.targets",
        ["expected no lm_head, whose weights are those of the input embedding too", "Leave it out."],
    ),
    "frozen weights kept where none are frozen": (
        ["checkpoint.store_frozen=true"],
        "checkpoint.store_frozen",
        ["true: expected false with adapter.kind = full, which freezes nothing", "adapter.kind=lora"],
    ),
    # guards
    "copies of zero3 compared": (
        [*NODE8, *zero(3, "train.replica_check_steps=100")],
        "train.replica_check_steps",
        ["100: expected null with zero3, which keeps each weight on one rank alone"],
    ),
    "copies of fsdp2 without copies compared": (
        [*NODE8, "strategy.kind=fsdp2", "train.replica_check_steps=100"],
        "train.replica_check_steps",
        ["expected null with fsdp2 over the world size 8", "strategy.replicate=2"],
    ),
    "one rank compared": (
        ["strategy.kind=ddp", "cluster.nproc_per_node=1", "train.replica_check_steps=100"],
        "train.replica_check_steps",
        ["expected null on one rank"],
    ),
    "rollback without checkpoints": (
        ["checkpoint.every_steps=null", "train.on_spike=rollback"],
        "train.on_spike",
        ["rollback: expected checkpoints to go back to", "Set checkpoint.every_steps"],
    ),
}  # fmt: skip


def problems(folder: Path, *overrides: str) -> list[Problem]:
    """What is wrong with the good recipe once it is changed so."""
    try:
        loaded(folder, *overrides)
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_combination_is_one_problem_with_key_value_what_is_allowed_and_the_fix(here: Path, name: str):
    overrides, key, says = CASES[name]
    found = problems(here, *overrides)
    assert [problem.key for problem in found] == [key], found
    (problem,) = found
    for part in says:
        assert part in str(problem)
    assert problem.expected
    if any(argument.startswith(f"{key}=") for argument in overrides):
        assert problem.where.startswith(f"argument {key}=")
    assert set(problem.because) <= set(known_keys())


def test_the_table_is_long_enough():
    assert len(CASES) >= 40


def test_a_wrong_combination_ends_the_command_with_code_2_and_no_traceback(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    write(here, GOOD)
    with pytest.raises(SystemExit) as exit:
        main(["check", "recipe.yaml", "strategy=zero2", "strategy.offload.params=cpu"])
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(
        "recipe.yaml: 1 problem\n  argument strategy.offload.params=cpu: strategy.offload.params = cpu"
    )
    assert "Traceback" not in text


GOOD_COMBINATIONS = [
    [*NODE8, "strategy=hsdp", "strategy.reshard_after_forward=4"],
    [*TWO_NODES, "strategy=hsdp", "train.replica_check_steps=100", "train.on_nonfinite=rollback"],
    [*NODE8, "strategy=zero2", "train.replica_check_steps=1", "train.on_spike=skip"],
    [*TWO_NODES, "strategy=hsdp"],
    [*TWO_NODES, "strategy=zeropp"],
    [*TWO_NODES, "strategy=zeropp", "strategy.zero.quantized_gradients=true", FP16_LINKS],
    [*TWO_NODES, "strategy=zero3", "strategy.zero.hpz_partition_size=16"],
    ["strategy=zero3", "strategy.zero={param_persistence_threshold: 0, prefetch_bucket_size: 0}"],
    ["strategy=zero1", "strategy.zero={reduce_bucket_size: 1000, allgather_bucket_size: 1000, overlap_comm: false}"],
    ["strategy=zero2-offload", *CPU],
    ["strategy=zero3-nvme"],
    ["strategy=zero3", "strategy.offload.params=cpu"],
    ["strategy=zero3", "strategy.offload={optimizer: nvme, nvme_path: /disk}"],
    ["strategy=zero2", "strategy.deepspeed={zero_optimization: {round_robin_gradients: true}}"],
    ["strategy=zero2", "model.dtype=bf16", "model.gradient_checkpointing=selective"],
    ["model.compile=true", "adapter.kind=lora", "model.dtype=bf16"],
    ["strategy=zero2", "model.compile=true"],
    ["strategy=zero3", "model.gradient_checkpointing=selective"],
    ["strategy.prefetch=2", "strategy.reshard_after_forward=false"],
    ["adapter={kind: lora, rank: 8, alpha: 16, dropout: 0.1, targets: [q_proj]}", "checkpoint.store_frozen=true"],
    ["model={config: {model_type: gpt_bigcode}, tokenizer: a/b}", "model.liger=auto"],
    ["model.liger=true"],  # of a hub model that is not at hand: the rank says so
    ["train.tf32=true", "train.precision=fp32", "model.attention=flex"],
    [*CPU, "model.dtype=bf16", "train.precision=bf16"],
]


@pytest.mark.parametrize("overrides", GOOD_COMBINATIONS, ids=" ".join)
def test_what_goes_together_is_accepted(here: Path, overrides: list[str]):
    assert problems(here, *overrides) == []


def test_a_wrong_strategy_kind_hides_complaints_that_rest_on_it(here: Path):
    found = problems(here, "strategy.kind=zero4", "strategy.prefetch=2", "strategy.offload.params=nvme")
    assert {problem.key for problem in found} == {"strategy.kind", "strategy.offload.nvme_path"}


def test_every_strategy_says_where_each_state_may_lie_and_the_table_of_readers_names_keys_that_exist():
    kinds = typing.get_args(typing.get_type_hints(Strategy)["kind"])
    assert set(_PLACES) == {(kind, key) for kind in kinds for key in ("optimizer", "params")}
    assert {f"strategy.{key}" for key in _READ_BY} <= set(known_keys())
    assert {kind for readers in _READ_BY.values() for kind in readers} <= set(kinds)


def test_the_architecture_is_read_from_a_models_folder(here: Path):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    (problem,) = problems(here, "model.name=./model", "model.liger=true")
    assert "model_type gpt_bigcode" in problem.expected


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_architectures_with_kernels_are_those_of_the_installed_liger():
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert set(MODEL_TYPE_TO_APPLY_LIGER_FN) == LIGER_MODELS
