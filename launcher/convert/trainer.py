"""A `checkpoint-N` folder of transformers' Trainer: safetensors with or without index, and optimizer.pt by position."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launcher.convert.restricted import entry_of, load_torch
from launcher.convert.source import MOMENTS, Source, as_step, one_step, trainer_step
from launcher.errors import UserError

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.pt"


def is_trainer(path: Path) -> bool:
    """Whether a folder holds weights as transformers saves them."""
    return any((path / name).is_file() for name in (*WEIGHTS, INDEX))


def open_trainer(path: Path, lm: nn.Module, *, optimizer: bool) -> Source:
    """See the module.

    Args:
        lm: the recipe's model without weights; optimizer.pt knows parameters only by their position in it
        optimizer: look at optimizer.pt
    Raises:
        UserError: a file is missing or unreadable, or optimizer.pt does not fit the model.
    """
    files = _files(path)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    whole: dict[str, Tensor] = {}
    if _lies_otherwise(lm, shapes):
        whole = _converted(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    title = f"transformers checkpoint {path.name}"
    state: dict[str, dict[str, Any]] = {}
    updates, why = None, f"it holds no {OPTIMIZER}"
    if optimizer and (path / OPTIMIZER).is_file():
        state, why = _optimizer_state(path / OPTIMIZER, lm)
        updates = one_step({as_step(entry["step"]) for entry in state.values() if "step" in entry}, title)

    def read(name: str, kind: str) -> Tensor:
        if kind != "value":
            return state[own_name(name)][kind]  # type: ignore[no-any-return]
        return whole[name] if whole else files[name].get_tensor(name)  # type: ignore[no-any-return]

    known = frozenset(name for name in shapes if own_name(name) in state)
    return Source(
        title, shapes, read, moments=known, step=trainer_step(path), updates=updates, why_no_moments=why,
    )  # fmt: skip


def own_name(name: str) -> str:
    """A name of the files as the model here has it: adapters are saved below `base_model.model.`."""
    return name.removeprefix("base_model.model.")


def _files(path: Path) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    from safetensors import SafetensorError, safe_open

    names = [name for name in WEIGHTS if (path / name).is_file()]
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path / INDEX}: cannot be read: {error}") from error
        if missing := [name for name in names if not (path / name).is_file()]:
            raise UserError(f"{path}: {', '.join(missing[:3])}: named in {INDEX}, but missing.")
    found: dict[str, Any] = {}
    for name in names:
        try:
            file = safe_open(path / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / name}: cannot be read: {error}") from error
        found |= dict.fromkeys(file.keys(), file)
    return found


def _lies_otherwise(lm: nn.Module, names: Collection[str]) -> bool:
    """Whether these files are cut otherwise than the architecture's memory (experts fused into one tensor)."""
    from transformers.core_model_loading import revert_weight_conversion

    from launcher.trainer.model import hugging_face_name

    inside = {hugging_face_name(name): p.to("meta") for name, p in lm.state_dict(keep_vars=True).items()}
    if {own_name(name) for name in names} <= set(inside):
        return False
    return set(revert_weight_conversion(lm, inside)) != set(inside)


def _converted(path: Path) -> dict[str, Tensor]:
    """Parameters as they lie in memory, whole, converted by transformers."""
    from transformers import AutoModelForCausalLM

    from launcher.trainer.model import named_state

    try:
        return dict(named_state(AutoModelForCausalLM.from_pretrained(path, dtype="auto")))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _optimizer_state(file: Path, lm: nn.Module) -> tuple[dict[str, dict[str, Any]], str]:
    """({parameter name: its state}, why that is empty).

    The Trainer's optimizer has two groups, with and without weight decay, each in the order of the model's parameters.
    """
    saved = load_torch(file)
    state = entry_of(saved, "state", dict, file)
    groups = [entry_of(group, "params", list, file) for group in entry_of(saved, "param_groups", list, file)]
    for number in state:
        entry_of(state, number, dict, file)
    if not all(isinstance(entry.get(kind), Tensor) for entry in state.values() for kind in MOMENTS):
        kinds = sorted({str(kind) for entry in state.values() for kind in entry})
        return {}, f"{OPTIMIZER} holds {', '.join(kinds)}: expected {' and '.join(MOMENTS)}"
    expected = trainer_groups(lm)
    fitting = [g for g in (expected, [g for g in expected if g]) if [len(x) for x in g] == [len(x) for x in groups]]
    if not fitting:
        ours, theirs = ([len(group) for group in x] for x in (expected, groups))
        raise UserError(
            f"{file}: has groups of {theirs} parameters: expected {ours}, those that the recipe's model trains. "
            "Another optimizer or other frozen parameters? --weights-only leaves it out."
        )
    found = {}
    for names, ids in zip(fitting[0], groups, strict=True):
        for (name, parameter), number in zip(names, ids, strict=True):
            if number not in state:
                raise UserError(f"{file}: holds no state of {name}.")
            shape = tuple(state[number]["exp_avg"].shape)
            if shape != tuple(parameter.shape):
                raise UserError(f"{file}: {name} is {list(shape)} there, the model's is {list(parameter.shape)}.")
            found[name] = state[number]
    return found, ""


def trainer_groups(lm: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Trained parameters with and without weight decay, as the Trainer of transformers 4 and 5 splits them."""
    from launcher.trainer.model import hugging_face_name

    decayed = set(_decayed(lm))
    trained = [(name, p) for name, p in lm.named_parameters() if p.requires_grad]
    return [
        [(hugging_face_name(name), p) for name, p in trained if (name in decayed) == with_decay]
        for with_decay in (True, False)
    ]


_NO_DECAY = [re.compile(p) for p in (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")]


def _decayed(module: nn.Module) -> list[str]:
    """`transformers.trainer_pt_utils.get_parameter_names` with the Trainer's patterns."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            continue
        names = [f"{name}.{inner}" for inner in _decayed(child)]
        found += [path for path in names if not _matches(path)]
    return found + [name for name in module._parameters if not _matches(name)]


def _matches(name: str) -> bool:
    return any(pattern.search(name.lower()) for pattern in _NO_DECAY)
