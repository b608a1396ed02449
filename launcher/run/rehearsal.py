"""rehearsal.json: what the checkpoint that was tried out before the first step cost; written by rank 0, read by all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic

FILE = "rehearsal.json"


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one save and one load cost.

    bytes: of the whole checkpoint, over all ranks
    blocked_s: how long training stood still for the save
    durable_s: from the beginning of the save to its durable marker
    load_s: to verify it and to read it back into the engine
    world_size, attempt: by how many ranks of which attempt
    """

    bytes: int
    blocked_s: float
    durable_s: float
    load_s: float
    world_size: int
    attempt: int


def write_rehearsal(run: RunDirectory, found: Rehearsal) -> None:
    """Replace what is known."""
    write_atomic(run.path / FILE, json.dumps({"version": 1, **asdict(found)}) + "\n")


def read_rehearsal(run: RunDirectory) -> Rehearsal | None:
    """What is known; None where nothing was rehearsed."""
    values = read_json(run.path / FILE) or {}
    if any(f.name not in values for f in fields(Rehearsal)):
        return None
    return Rehearsal(**{f.name: values[f.name] for f in fields(Rehearsal)})
