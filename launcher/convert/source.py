"""What is known of another tool's checkpoint, whichever tool it was, and how one tensor of it is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.convert.restricted import first_line
from launcher.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Source:
    """One checkpoint of another tool.

    title: what it is, for people
    shapes: source name -> shape of each tensor it can give
    read: (source name, kind) -> the whole tensor; kind is `value`, `exp_avg` or `exp_avg_sq`
    moments: source names of which it has both moments
    step: optimizer steps as its tool counts them; None where it does not say
    updates: the optimizer's own count, None without optimizer state
    aliases: source name -> the name under which a tied parameter really lies
    why_no_moments: what is missing where `moments` is empty
    """

    title: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, str], Tensor]
    moments: frozenset[str] = frozenset()
    step: int | None = None
    updates: int | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    why_no_moments: str = "it holds no optimizer state"


@contextlib.contextmanager
def taken_apart(what: Path | str) -> Iterator[None]:
    """Inside, whatever fails is a fault of the files, whose layout no reader can check in every place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: is damaged or not laid out as its tool does: {first_line(error)}.") from error


def trainer_step(folder: Path) -> int | None:
    """`global_step` of a trainer_state.json in the folder, None without one."""
    file = folder / "trainer_state.json"
    if not file.exists():
        return None
    try:
        return int(json.loads(file.read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def one_step(counts: set[int], title: str) -> int | None:
    """The one count of updates that all parameters have.

    Raises:
        UserError: they differ, which ZeRO could not go on with.
    """
    if len(counts) > 1:
        found = ", ".join(map(str, sorted(counts)))
        raise UserError(f"{title}: its parameters had different numbers of updates ({found}): expected one for all.")
    return next(iter(counts), None)


def as_step(value: Any) -> int:
    """A count of updates, whether it was kept as a number or as a tensor."""
    return int(value.item() if isinstance(value, Tensor) else value)
