"""The weights of a checkpoint as the safetensors files that Hugging Face knows, one parameter in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.run.files import write_atomic
from launcher.trainer.checkpoint.format import DTYPES, Snapshot, head_bytes, write_file
from launcher.trainer.checkpoint.reader import Reader

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD = "5GB"


def write_weights(reader: Reader, lm: Any, folder: Path, *, dtype: str | None, max_shard: int | str = MAX_SHARD) -> str:
    """Write model.safetensors, or numbered files of at most `max_shard` and their index.

    Args:
        lm: the model's class without weights; says how names and layouts differ from those on the hub
        dtype: fp32, bf16, fp16, or None for the stored types; integers stay as they are
    Returns:
        torch's name of the type of most weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes, load = _tensors(reader, lm, None if dtype is None else TYPES[dtype])
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard)
    for file, names in split.filename_to_tensors.items():
        names = sorted(names, key=lambda name: -shapes[name].element_size())  # wide types first keeps all aligned
        write_file(folder / file, Snapshot(_head({name: shapes[name] for name in names}), _bytes(names, load)))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    sizes: dict[torch.dtype, int] = {}
    for tensor in shapes.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return str(max(sizes, key=lambda key: sizes[key])).removeprefix("torch.")


def _tensors(reader: Reader, lm: Any, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Names, shapes and types as meta tensors, and how to get one with its content.

    Some architectures lie in memory otherwise than in files (experts fused into one tensor); only those are converted,
    by transformers, whole.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def target(name: str) -> torch.dtype:
        stored = reader.dtype(name)
        return dtype if dtype is not None and stored.is_floating_point else stored

    shapes = {
        name: torch.empty(entry["shape"], dtype=target(name), device="meta")
        for name, entry in reader.manifest["params"].items()
    }
    if set(revert_weight_conversion(lm, dict(shapes))) == set(shapes):
        return shapes, lambda name: reader.read(name).to(target(name))
    whole = revert_weight_conversion(lm, {name: reader.read(name).to(target(name)) for name in shapes})
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
