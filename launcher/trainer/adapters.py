"""Adapters: which layers get one, what it starts from, and how its parameters are called.

peft supplies the layers. It is imported only where there is an adapter, and changes the model in place, so that all
that knows the model knows it still.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.errors import UserError
from launcher.trainer.randomness import random_state_key

if TYPE_CHECKING:
    from launcher.recipe.schema import Adapter

ALL_LINEAR = "all-linear"
NAME = "default"  # peft's name of an adapter that nobody named
_WRAPPED = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)|(?<=\.lora_[AB])\." + NAME + r"(?=\.weight$)")


def inject(lm: Any, adapter: Adapter) -> str:
    """Freeze the model and put adapters beside its target layers, in place; a clause for the log.

    The new parameters are fp32 whatever the model's type is, so that what learns has an exact master copy. Inside
    `parameters_on_meta` they go to the meta device.

    Raises:
        UserError: a target is no linear layer of this model or cannot have an adapter, or the rank is above its width.
    """
    from peft import inject_adapter_in_model

    chosen = target_layers(lm, adapter.targets)
    _refuse_too_wide((lm.get_submodule(name) for name in chosen), adapter.rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how GPT-2 lays out its weights, and that a head is tied: both are known
        try:
            inject_adapter_in_model(lora_config(adapter, chosen), lm, adapter_name=NAME)
        except ValueError as error:
            raise UserError(f"adapter.targets: {error}") from error
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained, total = count(lm)
    return (
        f"lora of rank {adapter.rank} on {len(chosen)} layers, "
        f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    )


def lora_config(adapter: Adapter, targets: Iterable[str], **more: Any) -> Any:
    """peft's configuration of this adapter."""
    from peft import LoraConfig

    alpha = scale(adapter) * adapter.rank
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        **more,
    )


def scale(adapter: Adapter) -> float:
    """What the product of the two matrices is multiplied by."""
    return 2.0 if adapter.alpha is None else adapter.alpha / adapter.rank


def start(lm: Any, seed: int) -> None:
    """Give the adapters of a real model their start values, decided by the seed alone: A uniform, B zero.

    Reference: the initialisation of arXiv:2106.09685 as peft has it.
    """
    generator = torch.Generator().manual_seed(random_state_key(seed, -1, 0))  # steps and ranks count from 0
    for name, parameter in lm.named_parameters():
        if name.endswith(f".lora_A.{NAME}.weight"):
            nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5), generator=generator)
        elif name.endswith(f".lora_B.{NAME}.weight"):
            nn.init.zeros_(parameter.data)


def plain_name(name: str) -> str:
    """A parameter's name without what peft put into it: q_proj.base_layer.weight is the q_proj.weight of the base."""
    return _WRAPPED.sub("", name)


def has_adapter(module: nn.Module | None) -> bool:
    """Whether this layer got one."""
    return hasattr(module, "lora_A")


def count(module: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all of them)."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def target_layers(lm: Any, targets: Iterable[str]) -> list[str]:
    """Names of the layers that get an adapter, in the model's order.

    Raises:
        UserError: names every target that is no linear layer of this model, and what comes nearest.
    """
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()
    linear = {name: m for name, m in lm.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    chosen: set[str] = set()
    problems = []
    for target in targets:
        if target == ALL_LINEAR:
            found = {name for name, m in linear.items() if m is not head}
        else:
            found = {name for name in linear if _ends_with(name, target)}
        chosen |= found
        if not found:
            problems.append(_unmatched(target, lm, linear))
    if problems:
        raise UserError("\n".join(problems))
    if tied := [name for name in chosen if _is_tied_head(lm, linear[name])]:
        raise UserError(
            f"adapter.targets = {tied[0]}: expected a layer of its own, this one's weights are those of the input "
            "embedding too. Leave it out."
        )
    return [name for name in linear if name in chosen]


def endings(lm: Any, chosen: Iterable[str]) -> list[str]:
    """The same layers of a model without adapters as last parts of their names where those mean no more, else whole."""
    chosen = set(chosen)
    last = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name, _ in lm.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == chosen else chosen)


def _refuse_too_wide(layers: Iterable[nn.Module], rank: int) -> None:
    """A rank that exceeds what every layer has; a gate with few outputs among them is no reason."""
    most = max(min(layer.weight.shape) for layer in layers)  # type: ignore[type-var, arg-type]
    if rank > most:
        expected = f"at most {most}, the smaller dimension of the layers it is put beside"
        raise UserError(f"adapter.rank = {rank}: expected {expected}. 16 is usual; or adapter.kind=full.")


def _is_tied_head(lm: Any, layer: nn.Module) -> bool:
    return layer is lm.get_output_embeddings() and layer.weight is lm.get_input_embeddings().weight


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unmatched(target: str, lm: Any, linear: Mapping[str, nn.Module]) -> str:
    other = next((m for name, m in lm.named_modules() if _ends_with(name, target)), None)
    own = [name for name, m in linear.items() if not _is_tied_head(lm, m)]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in own))
    near = difflib.get_close_matches(target, [*leaves, *own], n=3, cutoff=0.5)
    fix = f"Nearest: {', '.join(near)}." if near else f"This model's are {', '.join(leaves[:12])}."
    article = "an" if type(other).__name__[0] in "AEIOU" else "a"
    is_other = f"it is {article} {type(other).__name__}" if other is not None else "this model has none of that name"
    return f"adapter.targets = {target}: expected the name, or its ending, of a linear layer; {is_other}. {fix}"
