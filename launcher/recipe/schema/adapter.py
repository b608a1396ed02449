"""Section `adapter`: which parameters learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import Problem, show_value


@dataclass(kw_only=True, slots=True)
class Adapter:
    """Which parameters learn.

    kind: full trains every parameter (no adapter); lora trains two thin matrices beside each target and freezes the
        rest (arXiv:2106.09685, through peft)
    rank: width of the thin matrices
    alpha: the adapter's output is scaled by alpha / rank; null: 2 x rank
    dropout: share of the adapter's inputs dropped in training, 0 to 1
    targets: names or endings of names of the linear layers that get an adapter; all-linear: each but the output layer
    """

    kind: Literal["full", "lora"] = "full"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])


def check(adapter: Adapter) -> Iterator[Problem]:
    """Rules of this section alone."""
    if adapter.kind == "full":
        yield from _of_no_adapter(adapter)
        return
    if adapter.rank < 1:
        yield Problem("adapter.rank", adapter.rank, "1 or more")
    if adapter.alpha is not None and adapter.alpha <= 0:
        yield Problem("adapter.alpha", adapter.alpha, "a number above 0, or null")
    if not 0 <= adapter.dropout < 1:
        yield Problem("adapter.dropout", adapter.dropout, "a share of 0 or more and below 1")
    if not adapter.targets or not all(adapter.targets):
        yield Problem("adapter.targets", adapter.targets, "names of layers, or all-linear", "Write [all-linear].")


def _of_no_adapter(adapter: Adapter) -> Iterator[Problem]:
    default = Adapter()
    for key in ("rank", "alpha", "dropout", "targets"):
        value, unset = getattr(adapter, key), getattr(default, key)
        if value != unset:
            expected = f"{show_value(unset)} (the default) with adapter.kind = full, which has no adapter"
            fix = "Remove the key, or write adapter.kind=lora."
            yield Problem(f"adapter.{key}", value, expected, fix, because=("adapter.kind",))
