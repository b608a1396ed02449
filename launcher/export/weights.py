"""Where exported weights come from: the checkpoint, or the base model with the checkpoint's adapter added to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.errors import UserError
from launcher.recipe.schema import Recipe
from launcher.trainer.adapters import scale
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.frozen import combined, digest
from launcher.trainer.model import load_config, named_state, read_weights

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by Hugging Face name, loaded one at a time.

    shapes: of each its shape and type, as a meta tensor
    load: one of them with its content; its type may be wider than the one said
    finish: called once all were loaded; raises UserError when they must not be used
    """

    shapes: dict[str, Tensor]
    load: Callable[[str], Tensor]
    finish: Callable[[], None] = lambda: None


def of_checkpoint(reader: Reader) -> Weights:
    """Everything that the checkpoint holds."""
    return Weights({name: _meta(reader, name) for name in reader.manifest["params"]}, reader.read)


def of_adapter(reader: Reader) -> Weights:
    """The adapter alone."""
    return Weights({name: _meta(reader, name) for name in adapter_names(reader)}, reader.read)


def merged(recipe: Recipe, reader: Reader, lm: Any) -> Weights:
    """The base model's weights, with scale * B @ A added in fp32 to those that have an adapter.

    Args:
        lm: the base model without weights
    """
    held = set(reader.manifest["params"])
    shapes = {name: tensor.to("meta") for name, tensor in named_state(lm)}
    base = reader.read if held >= set(shapes) else _base(recipe, shapes, reader)
    buffers = {name for name in shapes if name not in dict(lm.named_parameters())}
    across = {name for name, module in lm.named_modules() if type(module).__name__ == "Conv1D"}  # [in, out]
    factor, digests = scale(recipe.adapter), dict[str, str]()

    def load(name: str) -> Tensor:
        if name in buffers:
            return reader.read(name)
        tensor = base(name).to(shapes[name].dtype)
        if base != reader.read:
            digests[name] = digest(tensor)
        layer = name.removesuffix(".weight")
        if layer + A not in held:
            return tensor
        product = reader.read(layer + B).float() @ reader.read(layer + A).float()
        return tensor.float() + factor * (product.T if layer in across else product)

    def finish() -> None:
        then, now = reader.manifest.get("base"), combined(digests)
        if digests and then and then["frozen"] != now:
            raise UserError(
                f"model.name = {recipe.model.name}: expected the weights that {reader.folder.name} was trained beside "
                f"({then['frozen']}), found others ({now}). Nothing was written."
            )

    return Weights(shapes, load, finish)


def adapter_names(reader: Reader) -> list[str]:
    """The adapter's parameters in the checkpoint."""
    return [name for name in reader.manifest["params"] if name.endswith((A, B))]


def _meta(reader: Reader, name: str) -> Tensor:
    return torch.empty(reader.manifest["params"][name]["shape"], dtype=reader.dtype(name), device="meta")


def _base(recipe: Recipe, shapes: dict[str, Tensor], reader: Reader) -> Callable[[str], Tensor]:
    """How to get one weight of the base model: from its files where they name it so, else from the whole model."""
    model = recipe.model
    files = {} if model.name is None else _files(model.name, (reader.manifest.get("base") or {}).get("revision"))
    if set(files) >= {name for name in shapes if name not in reader.manifest["params"]}:
        return lambda name: _read(files[name], name)
    whole = read_weights(model, load_config(model), seed=recipe.train.seed)
    return lambda name: whole.pop(name)


def _files(name: str, revision: str | None) -> dict[str, Path]:
    """The safetensors file of each tensor of a folder or hub model; empty where it has none."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def find(file: str) -> Path | None:
        found = cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return Path(found) if found else None

    if (index := find("model.safetensors.index.json")) is not None:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        found = {file: find(file) for file in set(placed.values())}
        return {key: path for key, file in placed.items() if (path := found[file]) is not None}
    if (single := find("model.safetensors")) is None:
        return {}
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single)


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)  # type: ignore[no-any-return]
