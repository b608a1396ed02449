"""Section `model`: which weights or architecture are trained, and how their forward pass is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Model:
    """Which weights or architecture are trained, and how their forward pass is computed.

    name: hub id, or folder with config.json and safetensors; exclusive with `config`
    config: architecture as in a config.json (`model_type`, `hidden_size`, ...), weights random from `train.seed`
    tokenizer: hub id or folder of the tokenizer, or a tokenizer.json file; null: that of `name`
    revision: branch, tag or commit of a hub model
    trust_remote_code: run Python code that comes with the model
    dtype: type in which weights are kept and updated; fp32 is the master copy of mixed precision
    attention: attention back end; auto takes the fastest that keeps documents apart here, and logs why
    liger: Liger's fused kernels; auto: on a GPU where the architecture is supported
    compile: torch.compile each decoder block
    gradient_checkpointing: none keeps all activations; selective recomputes what is cheap and keeps matrix products and
        attention; full recomputes each decoder block; offload does too, and keeps each block's input in host memory
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    attention: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex", "sdpa", "eager"
    ] = "auto"
    liger: Literal["auto", True, False] = "auto"
    compile: bool = False
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = "none"


def check(model: Model) -> Iterator[Problem]:
    """Rules of this section alone."""
    if (model.name is None) == (model.config is None):
        yield Problem(
            "model.name",
            model.name,
            "either model.name or model.config",
            "Give a hub id or folder, or an architecture." if model.name is None else "Write null for one of the two.",
            because=("model.config",),
        )
    if model.config is not None and "model_type" not in model.config:
        yield Problem(
            "model.config",
            "(no model_type)",
            "a model_type, as in config.json",
            "Add e.g. model_type: llama.",
            because=("model.config.model_type",),
        )
    if model.config is not None and model.tokenizer is None:
        yield Problem("model.tokenizer", None, "a hub id or folder, because model.config brings no tokenizer")
