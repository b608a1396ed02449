"""Where figures go beside metrics.jsonl; a tracker is a class with `log` and `close`, found by its name in a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from launcher.errors import UserError


class Tracker(Protocol):
    """A receiver of figures."""

    def log(self, values: dict[str, Any]) -> None:
        """One object as metrics.jsonl holds it."""

    def close(self) -> None:
        """Write what is held back."""


class TensorBoard:
    """Scalars for TensorBoard, below `tensorboard/` in the run directory; a resumed run hides the steps it repeats."""

    def __init__(self, folder: Path, *, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.trackers = tensorboard: the package tensorboard is not installed. "
                "Install it with pip install 'train-launcher[trackers]'."
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, values: dict[str, Any]) -> None:
        """See Tracker."""
        for key, value in values.items():
            if key not in ("step", "time", "attempt") and isinstance(value, int | float):
                self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


TRACKERS = {"tensorboard": TensorBoard}


def open_trackers(names: list[str], folder: Path, *, step: int) -> list[Tracker]:
    """The trackers of a recipe.

    Args:
        step: updates finished before; later ones that an earlier attempt logged are hidden.
    """
    return [TRACKERS[name](folder, step=step) for name in names]
