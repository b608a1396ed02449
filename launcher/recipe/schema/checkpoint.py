"""Section `checkpoint`: when checkpoints are written and which are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """When checkpoints are written and which are kept. The last step and a stop request always write one.

    every_steps: save each so many optimizer steps; null: not by steps
    every_minutes: save when so many minutes have passed since the last; null: not by time
    keep_last: keep the newest so many checkpoints, 1 or more
    keep_every_steps: also keep every checkpoint whose step is a multiple of this; null: none
    store_frozen: also write weights that are not trained; false: their hash alone, and a resumed run reads them again
        from the model's own folder or seed
    async_save: write in a thread while training goes on; needs host memory for one copy of this rank's state
    """

    every_steps: int | None = 500
    every_minutes: float | None = None
    keep_last: int = 2
    keep_every_steps: int | None = None
    store_frozen: bool = False
    async_save: bool = True


def check(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Rules of this section alone."""
    for key, unit in (("every_steps", "step"), ("keep_every_steps", "step"), ("keep_last", "checkpoint")):
        value = getattr(checkpoint, key)
        if value is not None and value < 1:
            yield Problem(f"checkpoint.{key}", value, f"1 {unit} or more" + (", or null" if key != "keep_last" else ""))
    if checkpoint.every_minutes is not None and checkpoint.every_minutes <= 0:
        yield Problem("checkpoint.every_minutes", checkpoint.every_minutes, "minutes above 0, or null")
