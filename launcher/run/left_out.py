"""Which global batches a run makes no update with: written down when they spoilt the training, read by every attempt.

Why a batch is left out is decided in `launcher.trainer.guards`; its place among the rows and in the schedule stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from launcher.run.directory import RunDirectory
from launcher.run.files import append_line, read_lines

Reason = Literal["non_finite", "spike"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One global batch.

    step: of the update that it would have made, from 1, as in metrics.jsonl
    attempt: the one that met it
    loss: of the global batch; None: not finite
    limit: what a loss had to stay below; None: too few losses were known to say
    records: {source file: records of it whose documents are in the batch}; of a stream their places in the file
    """

    step: int
    attempt: int
    reason: Reason
    loss: float | None = None
    limit: float | None = None
    records: Mapping[str, Sequence[int]] | None = None
    time: float | None = None


def leave_out(run: RunDirectory, batch: LeftOut) -> None:
    """Write a global batch down, durably, before anybody says that the run is to go back.

    Raises:
        OSError: it could not be written.
    """
    append_line(run.left_out_file, asdict(batch))


def left_out(run: RunDirectory) -> dict[int, LeftOut]:
    """The global batches to leave out, by step; fields of a later version are passed over, the first line counts."""
    known = {f.name for f in fields(LeftOut)}
    found: dict[int, LeftOut] = {}
    for line in read_lines(run.left_out_file):
        if isinstance(line.get("step"), int) and isinstance(line.get("attempt"), int):
            found.setdefault(line["step"], _batch({key: line[key] for key in known & line.keys()}))
    return dict(sorted(found.items()))


def _batch(values: dict[str, Any]) -> LeftOut:
    """A reason that a later version gives reads as `non_finite`: what counts is that the batch is left out."""
    reason = values.get("reason")
    return LeftOut(**{**values, "reason": reason if reason in get_args(Reason) else "non_finite"})
