"""Keys `cluster.restart`: how often a run is started again by itself, by the class of what ended it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Restart:
    """How often a run goes on by itself after each class of end; counted until a person starts it again.

    A user's mistake never does.

    preemption: stops with a checkpoint because the scheduler or a time limit asked; null: as often as it happens
    node: lost nodes and agents that died without a word
    communication: NCCL, gloo and rendezvous errors
    hang: ranks that stood still
    non_finite: rollbacks behind a loss that is not finite or a spike (train.on_nonfinite, train.on_spike)
    out_of_memory: of a GPU or the host; the same step usually fails again
    data: records that cannot be read, checkpoints that are all bad
    unknown: ranks that were killed or raised something that has no class
    no_progress: starts in a row, whatever ended them, that wrote no checkpoint further on than the one before; one that
        left a global batch out is not among them
    backoff_s: pause before the second start in a row without progress, doubled before each further one; the first is
        not waited for
    backoff_max_s: the longest such pause
    """

    preemption: int | None = None
    node: int = 10
    communication: int = 5
    hang: int = 3
    non_finite: int = 3
    out_of_memory: int = 0
    data: int = 0
    unknown: int = 3
    no_progress: int = 2
    backoff_s: float = 5.0
    backoff_max_s: float = 300.0


def check(restart: Restart) -> Iterator[Problem]:
    """Rules of these keys alone."""
    for f in fields(restart):
        value, least = getattr(restart, f.name), 1 if f.name == "no_progress" else 0
        if value is not None and value < least:
            yield Problem(f"cluster.restart.{f.name}", value, f"{least} or more")
    if restart.backoff_s > (most := restart.backoff_max_s) >= 0:
        expected = f"at most the {most:g} s of cluster.restart.backoff_max_s"
        yield Problem(
            "cluster.restart.backoff_s", restart.backoff_s, expected, because=("cluster.restart.backoff_max_s",)
        )
