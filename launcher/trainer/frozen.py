"""Frozen weights: whether a checkpoint holds them, and else by what hash the base model is known again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.trainer.model import Skeleton, hugging_face_name

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe


def frozen_names(module: nn.Module) -> set[str]:
    """Hugging Face names of the parameters that do not learn."""
    return {hugging_face_name(name) for name, p in module.named_parameters() if not p.requires_grad}


def describe(recipe: Recipe, skeleton: Skeleton, weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What a manifest says of the frozen weights; collective, the same on every rank.

    Args:
        weights: as read, on the job's one reader; None elsewhere, and where the checkpoints hold the frozen ones
    Returns:
        name and revision of the base model, `frozen` (hash; null where none were read), `stored` (whether the
        checkpoint holds them).
    """
    box = [None if weights is None else _fingerprint(weights, skeleton.module)]
    dist.broadcast_object_list(box, src=0)
    return {
        "name": recipe.model.name,
        "revision": recipe.model.revision or getattr(skeleton.config, "_commit_hash", None),
        "frozen": box[0],
        "stored": recipe.checkpoint.store_frozen,
    }


def holds_frozen(checkpoint: Path) -> bool:
    """Whether it was written with `checkpoint.store_frozen`; one that is bad will not be opened, so it may."""
    from launcher.trainer.checkpoint.format import CheckpointError

    try:
        return bool(_base(checkpoint).get("stored"))
    except CheckpointError:
        return True


def same_base(checkpoint: Path | None, base: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoints of this attempt say of the frozen weights, after those of `checkpoint` have proven the same.

    Args:
        checkpoint: the one that was opened; an imported one does not know its base
        base: from `describe`
    Raises:
        UserError: the trained parameters were trained beside others; on every rank.
    """
    then = _base(checkpoint) if checkpoint is not None else {}
    if base["frozen"] is None:
        return {**base, **then, "stored": base["stored"]}
    if checkpoint is not None and then and base["frozen"] != then["frozen"]:
        raise UserError(
            f"model.name = {base['name']}: expected the frozen weights that {checkpoint.name} was trained beside:\n"
            f"  then: {_shown(then)}\n  now:  {_shown(base)}\n"
            "Give that model (model.revision pins one), or start another run with run.name=..."
        )
    return base


def digest(tensor: Tensor) -> str:
    """Hash of one tensor's type, shape and content; the tensor is in host memory."""
    import xxhash

    whole = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """One hash over all tensors, by sorted name, whatever the order in which they were read."""
    import xxhash

    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return f"xxh3-128 {xxhash.xxh3_128_hexdigest(lines.encode())}"


def _fingerprint(weights: Mapping[str, Tensor], module: nn.Module) -> str:
    """What the frozen weights are known by, in the types in which the module has them."""
    digests = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            plain = hugging_face_name(name)
            digests[plain] = digest(weights[plain].to(parameter.dtype))
    return combined(digests)


def _base(checkpoint: Path) -> dict[str, Any]:
    from launcher.trainer.checkpoint.reader import read_manifest

    return read_manifest(checkpoint).get("base") or {}


def _shown(base: Mapping[str, Any]) -> str:
    revision = f", revision {base['revision']}" if base["revision"] else ""
    return f"{base['name'] or 'random weights'}{revision}, {base['frozen']}"
