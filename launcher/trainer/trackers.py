"""Where figures go beside metrics.jsonl; a tracker is a class with `log` and `close`, found by its name in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import UserError
from launcher.trainer.trouble import Trouble


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
        self._open = lambda purge=None: SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._writer: Any = None
        self._trouble = Trouble("a figure for TensorBoard")
        with self._trouble.said():
            self._writer = self._open(step + 1 if step else None)

    def log(self, values: dict[str, Any]) -> None:
        """See Tracker. On a full disk the figures are left out, metrics.jsonl keeps them; a later call opens anew."""
        with self._trouble.said():
            writer, self._writer = self._writer or self._open(), None  # one that raises will never write again
            for key, value in values.items():
                if key not in ("step", "time", "attempt"):
                    for name, number in scalars(key, value):
                        writer.add_scalar(name, number, values["step"])
            self._writer = writer

    def close(self) -> None:
        """See Tracker."""
        if self._writer is not None:
            with self._trouble.said():
                self._writer.close()


def scalars(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """A figure as single numbers: `mix: {a: 0.5}` as `mix/a`."""
    if isinstance(value, dict):
        yield from ((f"{key}/{name}", number) for name, number in value.items())
    elif isinstance(value, int | float):
        yield key, value


TRACKERS = {"tensorboard": TensorBoard}


def open_trackers(names: list[str], folder: Path, *, step: int) -> list[Tracker]:
    """The trackers of a recipe.

    Args:
        step: updates finished before; later ones that an earlier attempt logged are hidden.
    """
    return [TRACKERS[name](folder, step=step) for name in names]
