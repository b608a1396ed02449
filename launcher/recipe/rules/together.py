"""Choices that go together: precision with kernels, kernels with architectures, engines with what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.errors import Problem
from launcher.recipe.paths import folder_config
from launcher.recipe.schema import Recipe

_CPU_ATTENTION = ("auto", "sdpa", "eager")  # flex has a forward pass on the CPU, but none backward
_HALF_ONLY = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen")
_HEADS = ("lm_head", "embed_out")  # names of the output layer

# model_type with kernels in liger-kernel 0.8 (MODEL_TYPE_TO_APPLY_LIGER_FN)
LIGER_MODELS = {
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava", "ministral",
    "mistral", "mixtral", "mllama", "mllama_text_model", "muse_glimmer", "nemotron", "olmo2", "olmo3",
    "paligemma", "phi3", "pixtral", "qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text",
    "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl",
    "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3", "smolvlm",
}  # fmt: skip


def precision(recipe: Recipe) -> Iterator[Problem]:
    """The type of the weights, that of the arithmetic, and what reads only some of them."""
    model, train, kind = recipe.model, recipe.train, recipe.strategy.kind
    if model.dtype == "bf16" and train.precision in ("fp32", "fp16"):
        fix = "Write auto, or model.dtype=fp32."
        expected = "auto or bf16 with model.dtype = bf16"
        yield Problem("train.precision", train.precision, expected, fix, because=("model.dtype",))
    if model.dtype == "bf16" and kind.startswith("zero") and recipe.adapter.kind == "lora":
        expected = f"fp32 with adapters and {kind}: DeepSpeed keeps one type, and would train the adapters in bf16"
        fix = "Write fp32: with train.precision=bf16 DeepSpeed holds the frozen weights in bf16 all the same."
        yield Problem("model.dtype", "bf16", expected, fix, because=("strategy.kind", "adapter.kind"))
    half_or_cpu = train.precision != "fp32" or recipe.cluster.accelerator == "cpu"
    if model.attention in _HALF_ONLY and not half_or_cpu:
        expected = "auto, flex, sdpa or eager with train.precision = fp32: flash kernels take half precision alone"
        fix = "Write auto, or train.precision=bf16."
        yield Problem("model.attention", model.attention, expected, fix, because=("train.precision",))
    yield from _quantized_gradients(recipe)


def _quantized_gradients(recipe: Recipe) -> Iterator[Problem]:
    """DeepSpeed 0.19 hands gradients of any type to kernels that read fp16 (csrc/quantization/pt_binding.cpp)."""
    strategy = recipe.strategy
    if strategy.zero.quantized_gradients and strategy.deepspeed.get("communication_data_type") != "fp16":
        expected = "false unless gradients travel in fp16, the one type that DeepSpeed's kernels read rightly"
        fix = "Write strategy.deepspeed.communication_data_type=fp16, or remove the key."
        yield Problem("strategy.zero.quantized_gradients", True, expected, fix, because=("strategy.deepspeed",))
    elif strategy.zero.quantized_gradients and recipe.cluster.nodes == 1:
        expected = "false on one node, where DeepSpeed reduces gradients as they are"
        because = ("cluster.nodes",)
        yield Problem("strategy.zero.quantized_gradients", True, expected, "Remove the key.", because=because)


def blocks(recipe: Recipe) -> Iterator[Problem]:
    """Compiling decoder blocks is for engines that do not hook into the layers inside them."""
    model, kind = recipe.model, recipe.strategy.kind
    if model.compile and kind == "zero3":
        expected = "false with zero3, which gathers weights by hooks on each layer, amid what would be compiled"
        fix = "Remove the key, or use strategy.kind=fsdp2, zero1 or zero2."
        yield Problem("model.compile", True, expected, fix, because=("strategy.kind",))


def kernels(recipe: Recipe) -> Iterator[Problem]:
    """Liger's kernels are for architectures it knows."""
    family = _config(recipe).get("model_type")
    if recipe.model.liger is True and isinstance(family, str) and family not in LIGER_MODELS:
        expected = f"auto or false: liger-kernel has nothing for model_type {family}"
        because = ("model.name", "model.config")
        yield Problem("model.liger", True, expected, "Write auto, which does without it.", because=because)


def adapter(recipe: Recipe) -> Iterator[Problem]:
    """What is said of frozen weights and of adapted layers fits the adapter."""
    kind, targets = recipe.adapter.kind, recipe.adapter.targets
    if recipe.checkpoint.store_frozen and kind == "full":
        fix = "Remove the key, or use adapter.kind=lora."
        expected = "false with adapter.kind = full, which freezes nothing"
        yield Problem("checkpoint.store_frozen", True, expected, fix, because=("adapter.kind",))
    if recipe.checkpoint.store_frozen and kind != "full" and recipe.strategy.offload.params == "nvme":
        expected = "false with strategy.offload.params = nvme: frozen weights are not in memory when one is written"
        fix = "Remove the key; they are read from the base model again."
        yield Problem("checkpoint.store_frozen", True, expected, fix, because=("strategy.offload.params",))
    tied = _config(recipe).get("tie_word_embeddings") is True
    if kind == "lora" and tied and (heads := [t for t in targets if t.rpartition(".")[2] in _HEADS]):
        expected = f"no {heads[0]}, whose weights are those of the input embedding too (tie_word_embeddings)"
        because = ("model.name", "model.config")
        yield Problem("adapter.targets", targets, expected, "Leave it out.", because=because)


def deepspeed(recipe: Recipe) -> Iterator[Problem]:
    """What DeepSpeed itself cannot do, and what may not be laid over its configuration."""
    if recipe.strategy.kind.startswith("zero"):
        from launcher.strategy.deepspeed import problems

        yield from problems(recipe)


def on_the_cpu(recipe: Recipe) -> Iterator[Problem]:
    """What needs a GPU where `cluster.accelerator` says that there is none."""
    model, train, zero = recipe.model, recipe.train, recipe.strategy.zero
    if recipe.cluster.accelerator != "cpu":
        return
    because = ("cluster.accelerator",)
    if train.precision == "fp16":
        yield Problem("train.precision", "fp16", "auto, fp32 or bf16 on the CPU", "Write auto.", because=because)
    if train.tf32:
        yield Problem("train.tf32", True, "false on the CPU, which has no TF32", "Remove the key.", because=because)
    if model.liger is True:
        expected = "auto or false on the CPU, its kernels need a GPU"
        yield Problem("model.liger", True, expected, "Write auto.", because=because)
    if model.attention not in _CPU_ATTENTION:
        expected = "auto, sdpa or eager on the CPU (cluster.accelerator = cpu), the others train on a GPU alone"
        yield Problem("model.attention", model.attention, expected, "Write auto.", because=because)
    if recipe.cluster.gpu_memory_gib is not None:
        expected, value = "null with cluster.accelerator = cpu", recipe.cluster.gpu_memory_gib
        yield Problem("cluster.gpu_memory_gib", value, expected, "Remove the key.", because=because)
    for key, why in (
        ("overlap_comm", "auto or false on the CPU, which has no streams"),
        ("quantized_weights", "false on the CPU, its kernels need a GPU"),
        ("quantized_gradients", "false on the CPU, its kernels need a GPU"),
    ):
        if getattr(zero, key) is True:
            yield Problem(f"strategy.zero.{key}", True, why, "Remove the key.", because=because)


def _config(recipe: Recipe) -> dict[str, Any]:
    """The architecture where it is given or lies in the model's folder; empty for a hub model."""
    return recipe.model.config or folder_config(recipe.model.name) or {}
