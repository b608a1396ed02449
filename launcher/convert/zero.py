"""A DeepSpeed ZeRO folder: flat fp32 partitions of stages 1, 2 and 3 read a parameter at a time, without DeepSpeed.

Layout as `deepspeed/utils/zero_to_fp32.py` reads it: `param_shapes` gives names and order; stages 1 and 2 cut each
group's concatenation into one partition a rank, stage 3 cuts each parameter and pads every cut to the same length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.convert.restricted import entry_of, load_torch
from launcher.convert.source import MOMENTS, Source, as_step, one_step
from launcher.errors import UserError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_STEP_FOLDERS = "global_step*"


def is_zero(path: Path) -> bool:
    """Whether a folder looks like one that DeepSpeed's `save_checkpoint` wrote, or the folder of one step in it."""
    return (path / "latest").is_file() or any(path.glob(_STEP_FOLDERS)) or any(path.glob("*_model_states.pt"))


def open_zero(path: Path) -> Source:
    """See the module.

    Raises:
        UserError: files are missing, too many, unreadable, or of a layout that is not read here.
    """
    folder = _step_folder(path)
    files = _optimizer_files(folder)
    states = [entry_of(load_torch(file), "optimizer_state_dict", dict, file) for file in files]
    stage = _stage(states[0], files[0])
    models = _model_files(folder, stage, len(files))
    model = load_torch(models[0])
    entry_of(model, "module", dict, models[0])
    said = ((model.get("ds_config") or {}).get("zero_optimization") or {}).get("stage", stage)
    title = f"DeepSpeed ZeRO-{said} checkpoint {folder.name} of {len(files)} rank{'s' * (len(files) > 1)}"
    _require_whole(states, files, folder)
    groups = entry_of(model, "param_shapes", list, models[0])
    trained = [{name: _shape(shape) for name, shape in group.items()} for group in groups]
    cut: _Stage12 | _Stage3 = _Stage3(states, trained) if stage == 3 else _Stage12(states, trained)
    cut.check(title)
    frozen = model.get("frozen_param_shapes") or {}
    fragments = [load_torch(file).get("frozen_param_fragments") or {} for file in models] if frozen else []
    buffers = {name: model["module"][name] for name in model.get("buffer_names") or () if name in model["module"]}
    shapes = {name: shape for group in trained for name, shape in group.items()}

    def read(name: str, kind: str) -> Tensor:
        if name in shapes:
            return cut.read(name, kind).view(shapes[name])
        if name in buffers:
            return buffers[name]
        shape = _shape(frozen[name])
        parts = [part[name].reshape(-1) for part in fragments] if stage == 3 else [fragments[0][name].reshape(-1)]
        return torch.cat(parts)[: math.prod(shape)].view(shape)

    fixed = {name: _shape(shape) for name, shape in frozen.items()}
    fixed |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    has_moments = cut.has_moments()
    updates = one_step(cut.steps(), title) if has_moments else None
    return Source(
        title, {**shapes, **fixed}, read, moments=frozenset(shapes if has_moments else ()),
        step=int(model["global_steps"]), updates=updates, aliases=dict(model.get("shared_params") or {}),
        why_no_moments=f"its optimizer kept no {' and '.join(MOMENTS)}, so it was no Adam",
    )  # fmt: skip


def _step_folder(path: Path) -> Path:
    """The folder with the files: the one given, or the one that `latest` names."""
    if any(path.glob("*_model_states.pt")):
        return path
    if (path / "latest").is_file():
        folder = path / (path / "latest").read_text().strip()
        if not folder.is_dir():
            raise UserError(f"{path}: `latest` names {folder.name}, which is not there.")
        return folder
    folders = sorted(found.name for found in path.glob(_STEP_FOLDERS) if found.is_dir())
    if len(folders) != 1:
        raise UserError(f"{path}: expected a file `latest`, or one of these as PATH: {', '.join(folders)}.")
    return path / folders[0]


def _optimizer_files(folder: Path) -> list[Path]:
    """The files with the partitions, by rank; none may be missing."""
    if others := [file.name for file in folder.glob("*expert*")] + [file.name for file in folder.glob("expp_rank_*")]:
        raise UserError(f"{folder}: {others[0]}: expert-parallel checkpoints are not read; expected plain ZeRO.")
    found = {}
    for file in folder.glob("*optim_states.pt"):
        if match := _OPTIMIZER.fullmatch(file.name):
            if int(match[2]):
                raise UserError(f"{folder}: {file.name}: model-parallel checkpoints are not read; expected mp_rank_00.")
            found[int(match[1])] = file
    if not found:
        raise UserError(
            f"{folder}: holds no *zero_pp_rank_*_optim_states.pt: expected a checkpoint of ZeRO stage 1, 2 or 3."
        )
    if missing := sorted(set(range(max(found) + 1)) - set(found)):
        raise UserError(f"{folder}: the optimizer states of ranks {missing} are missing.")
    return [found[rank] for rank in range(len(found))]


def _model_files(folder: Path, stage: int, ranks: int) -> list[Path]:
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    files = [folder / name for name in (names if stage == 3 else ["mp_rank_00_model_states.pt"])]
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{folder}: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} missing.")
    return files


def _stage(state: dict[str, Any], file: Path) -> int:
    """3, or 2 for stages 1 and 2, whose files are alike."""
    if "fp32_flat_groups" in state:
        return 3
    if "single_partition_of_fp32_groups" in state:
        return 2
    raise UserError(f"{file}: holds no fp32 partition: expected a checkpoint of ZeRO stage 1, 2 or 3.")


def _require_whole(states: Sequence[dict[str, Any]], files: Sequence[Path], folder: Path) -> None:
    count = states[0]["partition_count"]
    ranks = max(count) if isinstance(count, (list, tuple)) else int(count)
    if ranks == len(files):
        return
    if ranks > len(files):
        names = [files[0].name.replace("_rank_0_", f"_rank_{rank}_", 1) for rank in range(len(files), ranks)]
        raise UserError(f"{folder}: was written by {ranks} ranks; missing: {', '.join(names[:3])}.")
    raise UserError(
        f"{folder}: was written by {ranks} ranks and holds the files of {len(files)}. "
        "Files of an older checkpoint lie among them; remove those."
    )


def _shape(shape: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


class _Flat:
    """Tensors laid end to end, read by range."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.numel() for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> Tensor:
        found = []
        for part, end in zip(self._parts, self._ends, strict=True):
            begin = end - part.numel()
            low, high = max(start, begin), min(start + count, end)
            if low < high:
                found.append(part.reshape(-1)[low - begin : high - begin])
        return torch.cat(found) if found else torch.empty(0)


def _moments(base: Any, group: int) -> dict[str, Any]:
    """State of one flat group in the inner optimizer's state dict, or in the list that elastic checkpoints hold."""
    state = base[group] if isinstance(base, list) else base["state"].get(group, {})
    if "step" not in state and not isinstance(base, list):
        state = {
            **state,
            **{k: g[k] for g in base["param_groups"] if group in g["params"] for k in ("step",) if k in g},
        }
    return dict(state)


class _Stage12:
    """Each group is one flat tensor in order of `param_shapes`, cut into one partition a rank."""

    def __init__(self, states: Sequence[dict[str, Any]], trained: Sequence[dict[str, tuple[int, ...]]]) -> None:
        self._states, self._trained = states, trained
        paddings = states[0].get("param_alignment_paddings")
        self._place: dict[str, tuple[int, int, int]] = {}
        self._needed = []
        for group, shapes in enumerate(trained):
            at = 0
            for index, (name, shape) in enumerate(shapes.items()):
                self._place[name] = group, at, math.prod(shape)
                at += math.prod(shape)
                needed = at
                if paddings:
                    at += int(paddings[group][index])
            self._needed.append(needed if shapes else 0)

    def _flat(self, group: int, kind: str) -> _Flat:
        if kind == "value":
            return _Flat([state["single_partition_of_fp32_groups"][group] for state in self._states])
        return _Flat([_moments(state["base_optimizer_state"], group)[kind] for state in self._states])

    def check(self, title: str) -> None:
        """Refuse partitions that are too short for the parameters they should hold."""
        for group, needed in enumerate(self._needed):
            for kind in ("value", *(MOMENTS if self.has_moments() else ())):
                if (held := len(self._flat(group, kind))) < needed:
                    raise UserError(f"{title}: group {group} {kind}: expected {needed} elements, found {held}.")

    def has_moments(self) -> bool:
        states = [_moments(s["base_optimizer_state"], g) for s in self._states for g in range(len(self._trained))]
        return all(isinstance(state.get(kind), Tensor) for state in states for kind in MOMENTS)

    def steps(self) -> set[int]:
        found = set()
        for state in self._states:
            base = state["base_optimizer_state"]
            for group in range(len(self._trained)):
                step = _moments(base, group).get("step", state.get("base_optimizer_state_step"))
                found |= set() if step is None else {as_step(step)}
        return found

    def read(self, name: str, kind: str) -> Tensor:
        group, at, count = self._place[name]
        return self._flat(group, kind).read(at, count)


class _Stage3:
    """Each rank holds its cut of every parameter, in order, over sub-groups laid end to end."""

    def __init__(self, states: Sequence[dict[str, Any]], trained: Sequence[dict[str, tuple[int, ...]]]) -> None:
        self._states = states
        self._place: dict[str, tuple[int, int, int]] = {}
        at = 0
        for shapes in trained:
            for name, shape in shapes.items():
                count = math.prod(shape)
                part = -(-count // len(states))
                self._place[name] = at, part, count
                at += part
        self._needed = at

    def _flat(self, state: dict[str, Any], kind: str) -> _Flat:
        groups = state["fp32_flat_groups"]
        if kind == "value":
            return _Flat(groups)
        return _Flat([_moments(state["optimizer_state_dict"], group)[kind] for group in range(len(groups))])

    def check(self, title: str) -> None:
        """Refuse partitions of another length than the parameters' cuts together."""
        for rank, state in enumerate(self._states):
            for kind in ("value", *(MOMENTS if self.has_moments() else ())):
                if (held := len(self._flat(state, kind))) != self._needed:
                    raise UserError(f"{title}: rank {rank} {kind}: expected {self._needed} elements, found {held}.")

    def _group_states(self) -> list[dict[str, Any]]:
        groups = range(len(self._states[0]["fp32_flat_groups"]))
        return [_moments(state["optimizer_state_dict"], group) for state in self._states for group in groups]

    def has_moments(self) -> bool:
        return all(isinstance(state.get(kind), Tensor) for state in self._group_states() for kind in MOMENTS)

    def steps(self) -> set[int]:
        return {as_step(state["step"]) for state in self._group_states() if "step" in state}

    def read(self, name: str, kind: str) -> Tensor:
        at, part, count = self._place[name]
        return torch.cat([self._flat(state, kind).read(at, part) for state in self._states])[:count]
