"""What changed between a run's recipe and the one it is to go on with, and which changes make it another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import show_value
from launcher.strategy.explained import dotted

# what a run is: other weights, another task, other samples or another order of them would not be the same training
IDENTITY = (
    "model.name", "model.config", "model.tokenizer", "model.revision", "model.dtype", "adapter", "objective", "data",
    "train.seed", "train.global_batch_size",
)  # fmt: skip
FREE = ("data.cache_dir", "data.num_workers")  # inside `data`, yet without effect on the samples
# parameters that a checkpoint's bytes do not fit; alpha and dropout of an adapter change what is learnt, not its shape
WEIGHTS = ("model.name", "model.config", "model.dtype", "adapter.kind", "adapter.rank", "adapter.targets")
KIND = "adapter.kind"
OF_LORA = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets")
PLACE = ("run.name", "run.dir")  # where the run lies; it may have been moved


@dataclass(frozen=True, slots=True)
class Change:
    """One key and its values before and after."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {show_value(self.old)} -> {show_value(self.new)}"

    @property
    def breaks_identity(self) -> bool:
        return _under(self.key, IDENTITY) and not _under(self.key, FREE)

    @property
    def breaks_checkpoints(self) -> bool:
        """Whether checkpoints written before it cannot go on after it."""
        return _under(self.key, WEIGHTS)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs, in the order of the schema; where a run lies is no change.

    Nor is an adapter's rank where there is no adapter.
    """
    before, after = dotted(old), dotted(new)
    keys = [*after, *(key for key in before if key not in after)]
    found = [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    without_effect = (*PLACE, *OF_LORA) if before.get(KIND) == after.get(KIND) == "full" else PLACE
    return [change for change in found if not _under(change.key, without_effect)]


def _under(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, by dotted key."""
    return {key: value for key, value in dotted(recipe).items() if Change(key, None, None).breaks_identity}
