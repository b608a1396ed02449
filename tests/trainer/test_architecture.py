"""Architectures that transformers does not know or cannot build end in one line that names the key and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.recipe.schema import Model
from launcher.trainer import model
from tests.trainer import make


def build(config: dict[str, Any]) -> model.Skeleton:
    section = Model(config=config, tokenizer="none", attention="sdpa")
    return model.build_for(section, device=torch.device("cpu"), compute=torch.float32, objective_kind="sft")


KIND = "expected a causal language model that transformers knows."


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "lama"}, f"model.config.model_type = lama: {KIND} Did you mean 'llama'?"),
        ({"model_type": None}, f"model.config.model_type = null: {KIND}"),
        ({"model_type": "t5"}, f"model.config.model_type = t5: {KIND}"),
        ({"model_type": "bert"}, "model.config: bert is an encoder, each of its tokens sees the whole row: expected a "
         "causal language model, whose tokens see those before them alone. Take e.g. llama or qwen3."),
        ({**make.LLAMA, "hidden_sizes": 3},
         "model.config.hidden_sizes = 3: expected a key that llama knows. Did you mean 'hidden_size'?"),
        ({**make.LLAMA, "zzz": 3}, "model.config.zzz = 3: expected a key that llama knows. Remove it."),
        ({**make.LLAMA, "hidden_size": 33}, "model.config: no llama can be made of it: The hidden size (33) is not a "
         "multiple of the number of attention heads (4)."),
        ({**make.LLAMA, "hidden_act": "nope"}, "model.config: no model can be built from it: KeyError 'nope'."),
    ],
    ids=lambda value: "" if isinstance(value, str) else str([*value.items()][-1]),
)  # fmt: skip
def test_what_cannot_be_built_is_refused_in_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        build(config)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    "more",
    [
        {"rope_theta": 5e5, "torch_dtype": "float32", "_name_or_path": "x", "transformers_version": "4.40"},
        {"rope_scaling": None, "architectures": ["LlamaForCausalLM"], "auto_map": {}, "pretraining_tp": 1},
    ],
)
def test_keys_of_older_config_files_are_taken(more: dict[str, Any]) -> None:
    assert build({**make.LLAMA, **more}).config.hidden_size == make.LLAMA["hidden_size"]


def test_a_decoder_whose_config_calls_itself_none_is_built() -> None:
    sizes = {key: make.LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = build({"model_type": "gpt_neox", **sizes, "num_hidden_layers": 1}).config
    assert config.is_decoder is False
