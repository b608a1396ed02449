"""A PEFT adapter folder: what plain peft puts onto the base model, which stays where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.export.consolidate import write_tensors
from launcher.export.describe import write_tokenizer
from launcher.export.weights import Weights
from launcher.recipe.schema import Recipe
from launcher.run.files import write_atomic
from launcher.trainer.adapters import endings, lora_config, target_layers

PREFIX = "base_model.model."  # what peft's wrapper puts before a parameter's name


def write_adapter(recipe: Recipe, lm: Any, weights: Weights, folder: Path, *, revision: str | None) -> str:
    """Write adapter_config.json, adapter_model.safetensors and the tokenizer.

    Args:
        lm: the base model without weights
        revision: that of the base model on the hub
    Returns:
        torch's name of the type of the weights.
    """
    base = str(recipe.model.name)
    modules = dict(lm.named_modules())
    chosen = target_layers(lm, recipe.adapter.targets)
    config = lora_config(
        recipe.adapter,
        endings(lm, chosen),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        revision=revision,
        inference_mode=True,
        fan_in_fan_out=all(type(modules[name]).__name__ == "Conv1D" for name in chosen),
    )
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_atomic(folder / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    shapes = {PREFIX + name: tensor for name, tensor in weights.shapes.items()}
    write_tensors(folder / "adapter_model.safetensors", shapes, lambda name: weights.load(name.removeprefix(PREFIX)))
    write_tokenizer(recipe, folder)
    return str(next(iter(shapes.values())).dtype).removeprefix("torch.")
