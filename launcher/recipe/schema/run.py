"""Section `run`: what the run is called and where its directory lies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from launcher.errors import Problem

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # a line end would leave the comment of a script in which the name stands


@dataclass(kw_only=True, slots=True)
class Run:
    """What the run is called and where its directory lies.

    name: folder name of the run below `dir`; null: the recipe's file name without its ending
    dir: folder that holds run directories; with several nodes one that all of them share
    tags: free words kept with the run and shown by `launcher runs`
    """

    name: str | None = None
    dir: str = "runs"
    tags: list[str] = field(default_factory=list)


def check(run: Run) -> Iterator[Problem]:
    """Rules of this section alone."""
    if run.name is not None and (not run.name or "/" in run.name or run.name.startswith(".")):
        yield Problem("run.name", run.name, "a plain folder name", "Put the path into run.dir.")
    if run.name is not None and len(run.name.encode()) > 200:
        yield Problem("run.name", run.name[:40] + "...", "at most 200 bytes")
    for key in ("name", "dir"):
        if _CONTROL.search(value := getattr(run, key) or ""):
            yield Problem(f"run.{key}", value, "text without line ends and other control characters")
