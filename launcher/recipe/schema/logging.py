"""Section `logging`: how often figures are written and where else they go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Logging:
    """How often figures are written and where else they go; metrics.jsonl and the loss picture are always written.

    every_steps: one line of metrics each so many steps
    trackers: also send them there
    """

    every_steps: int = 1
    trackers: list[Literal["tensorboard"]] = field(default_factory=list)


def check(logging: Logging) -> Iterator[Problem]:
    """Rules of this section alone."""
    if logging.every_steps < 1:
        yield Problem("logging.every_steps", logging.every_steps, "1 step or more")
