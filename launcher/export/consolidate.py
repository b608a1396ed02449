"""Weights as the safetensors files that Hugging Face knows, one parameter in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.export.weights import Weights
from launcher.run.files import write_atomic
from launcher.trainer.checkpoint.format import DTYPES, Snapshot, head_bytes, write_file

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD = "5GB"


def write_weights(weights: Weights, lm: Any, folder: Path, *, max_shard: int | str = MAX_SHARD) -> str:
    """Write model.safetensors, or numbered files of at most `max_shard` and their index.

    Args:
        lm: the model's class without weights; says how names and layouts differ from those on the hub
    Returns:
        torch's name of the type of most weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes, load = _as_in_files(weights, lm)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: shapes[name] for name in names}, load)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    weights.finish()
    sizes: dict[torch.dtype, int] = {}
    for tensor in shapes.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return str(max(sizes, key=lambda key: sizes[key])).removeprefix("torch.")


def write_tensors(path: Path, shapes: dict[str, Tensor], load: Callable[[str], Tensor]) -> None:
    """Write one safetensors file, loading one tensor at a time."""
    names = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))  # wide types first keeps all aligned
    head = _head({name: shapes[name] for name in names})
    size = len(head) + sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())
    write_file(path, Snapshot(head, lambda: _bytes(names, load), size))


def with_dtype(weights: Weights, dtype: str | None) -> Weights:
    """The same weights in another type.

    Args:
        dtype: fp32, bf16, fp16, or None for the types as they are; integers stay as they are
    """
    shapes = {
        name: tensor.to(TYPES[dtype]) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in weights.shapes.items()
    }
    return Weights(shapes, lambda name: weights.load(name).to(shapes[name].dtype), weights.finish)


def _as_in_files(weights: Weights, lm: Any) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Names, shapes and types as files have them, and how to get one tensor with its content.

    Some architectures lie in memory otherwise than in files (experts fused into one tensor); only those are converted,
    by transformers, whole.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if set(revert_weight_conversion(lm, dict(weights.shapes))) == set(weights.shapes):
        return weights.shapes, weights.load
    whole = revert_weight_conversion(lm, {name: weights.load(name) for name in weights.shapes})
    return {name: tensor.to("meta") for name, tensor in whole.items()}, lambda name: whole.pop(name).contiguous()


def _head(shapes: dict[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shapes.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return head_bytes(header)


def _bytes(names: list[str], load: Callable[[str], Tensor]) -> Iterator[Tensor]:
    for name in names:
        yield load(name).reshape(-1).view(torch.uint8)
