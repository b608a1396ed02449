"""Checkpoints of other tools made into ours: which tool's it is, whether it fits the recipe's model, what it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.convert.fit import Fit, fit
from launcher.convert.source import Source, taken_apart
from launcher.errors import UserError
from launcher.recipe.schema import Recipe
from launcher.run.directory import MARKER, RunDirectory

Parameters = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Import:
    """A checkpoint of another tool that fits the recipe's model; nothing has been written.

    params: name -> {shape, dtype, trainable}, all that a checkpoint of the run holds
    moments: whether the optimizer goes on; else it starts anew
    num_frozen: parameters that come from the base model, not from the checkpoint
    base: what the manifest says of frozen parameters that the checkpoint holds, empty where there are none
    """

    source: Source
    fit: Fit
    params: Parameters
    moments: bool
    num_frozen: int
    base: dict[str, Any]

    @property
    def step(self) -> int:
        return self.source.step or 0

    def write(self, run: RunDirectory, attempt: int) -> Path:
        """Make it the checkpoint of an attempt; its folder."""
        from launcher.convert.write import write_checkpoint

        meta = {"base": self.base} if self.base else {}
        return write_checkpoint(run, attempt, self.source, self.fit, self.params, moments=self.moments, meta=meta)

    def notes(self) -> Iterator[str]:
        """What was taken, and what nobody can know, for people."""
        trained = [entry for entry in self.params.values() if entry["trainable"]]
        yield f"{self.source.title}, step {self.step}"
        if self.moments:
            yield f"weights and both moments of {len(trained)} parameters, {self.source.updates or 0} optimizer updates"
        else:
            yield f"weights of {len(trained)} parameters; the optimizer starts anew"
        if self.num_frozen:
            yield f"{self.num_frozen} frozen parameters are taken from the recipe's base model"
        yield (
            f"which rows it has seen is not known: this run takes rows and learning rate of its own order from step "
            f"{self.step} on"
        )


def open_import(path: Path, recipe: Recipe, *, weights_only: bool) -> Import:
    """Look at a checkpoint and at the recipe's model, and match them.

    Args:
        weights_only: leave optimizer state out, whether there is some or not
    Raises:
        UserError: what the checkpoint lacks, or why it cannot be read.
    """
    module = _skeleton(recipe)
    if recipe.adapter.kind == "full" and (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: is an adapter: add adapter.kind=lora, and adapter.rank, alpha and targets as its "
            "adapter_config.json has them; model.name is its base model."
        )
    with taken_apart(path):
        source = _open(path, module.lm, optimizer=not weights_only)
    params = _parameters(module, store_frozen=recipe.checkpoint.store_frozen)
    known = _names(module)
    found = fit(source, params, known)
    if not weights_only and found.without_moments:
        some = (
            ""
            if not source.moments
            else f" of {len(found.without_moments)} parameters, first {found.without_moments[0]}"
        )
        raise UserError(
            f"{path}: lacks the optimizer's moments{some}: {source.why_no_moments}. "
            "With --weights-only the weights are taken and the optimizer starts anew."
        )
    if source.step is None and not weights_only:
        raise UserError(
            f"{path}: does not say after how many steps it was written. Expected trainer_state.json beside it."
        )
    stored, frozen = recipe.checkpoint.store_frozen, sum(not p.requires_grad for p in module.parameters())
    base = {"name": recipe.model.name, "revision": recipe.model.revision, "frozen": None, "stored": True}
    return Import(
        source, found, params, moments=not weights_only, num_frozen=0 if stored else frozen,
        base=base if stored and frozen else {},
    )  # fmt: skip


def _open(path: Path, lm: Any, *, optimizer: bool) -> Source:
    """The source by what lies in the folder."""
    from launcher.convert import dcp, trainer, zero

    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with a checkpoint.")
    if (path / MARKER).exists() or RunDirectory(path).exists():
        raise UserError(f"{path}: is of this launcher already. `launcher resume RUN` goes on with a run.")
    if zero.is_zero(path):
        return zero.open_zero(path)
    if dcp.is_dcp(path):
        return dcp.open_dcp(path)
    if trainer.is_trainer(path):
        return trainer.open_trainer(path, lm, optimizer=optimizer)
    if inner := sorted(found.name for found in path.glob("checkpoint-*") if found.is_dir()):
        raise UserError(f"{path}: holds {', '.join(inner[-3:])}: give one of them as PATH.")
    held = ", ".join(sorted(found.name for found in path.iterdir())[:5]) or "nothing"
    raise UserError(
        f"{path}: no checkpoint that is read here: expected a DeepSpeed folder (latest, global_step*/), a transformers "
        f"checkpoint-N (model.safetensors) or a torch.distributed.checkpoint folder (.metadata). It holds {held}."
    )


def _skeleton(recipe: Recipe) -> Any:
    """The recipe's trained module without weights; no attention kernel is needed for that."""
    import torch

    from launcher.trainer import model

    plain = replace(recipe.model, attention="eager", liger=False, compile=False, gradient_checkpointing="none")
    return model.build_for(
        plain, device=torch.device("cpu"), compute=torch.float32, objective_kind=recipe.objective.kind,
        adapter=recipe.adapter,
    ).module  # fmt: skip


def _parameters(module: Any, *, store_frozen: bool) -> Parameters:
    from launcher.trainer.engines.base import stored_parameters
    from launcher.trainer.model import hugging_face_name, persistent_buffers

    return {
        hugging_face_name(name): {
            "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "trainable": p.requires_grad,
        }
        for name, p in [*stored_parameters(module, store_frozen), *persistent_buffers(module)]
    }  # fmt: skip


def _names(module: Any) -> set[str]:
    """Every name of the model's state, tied ones under each of theirs."""
    from launcher.trainer.model import hugging_face_name

    return {hugging_face_name(name) for name in module.state_dict(keep_vars=True)}
