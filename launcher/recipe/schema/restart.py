"""Keys `cluster.restart`: how often a run is started again by itself, by the class of what ended it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Restart:
    """How often a run goes on by itself after each class of end; counted until a person starts it again.

    A preemption with a checkpoint always goes on. User errors, data errors and numbers that are not finite never do.

    node: lost nodes and agents that died without a word
    communication: NCCL, gloo and rendezvous errors
    hang: ranks that stood still
    unknown: ranks that were killed or raised something that has no class
    no_progress: starts in a row, whatever ended them, that wrote no checkpoint further on than the one before
    """

    node: int = 10
    communication: int = 5
    hang: int = 3
    unknown: int = 1
    no_progress: int = 3


def check(restart: Restart) -> Iterator[Problem]:
    """Rules of these keys alone."""
    for f in fields(restart):
        value, least = getattr(restart, f.name), 1 if f.name == "no_progress" else 0
        if value < least:
            yield Problem(f"cluster.restart.{f.name}", value, f"{least} or more")
