"""Section `checkpoint`: when checkpoints are written and which are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.errors import Problem, nearest

# what a mirror's URL may begin with -> the package that fsspec reaches it by (extra `cloud`); None: fsspec itself
STORES = {"file": None, "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """When checkpoints are written and which are kept. The last step and a stop request always write one.

    every_steps: save each so many optimizer steps; auto: as often as pays, from what a save was measured to cost and
        mttf_hours; null: not by steps
    every_minutes: save when so many minutes have passed since the last; null: not by time
    keep_last: keep the newest so many checkpoints, 1 or more
    keep_every_steps: also keep every checkpoint whose step is a multiple of this; null: none
    store_frozen: also write weights that are not trained; false: their hash alone, and a resumed run reads them again
        from the model's own folder or seed
    async_save: write in a thread while training goes on; needs host memory for one copy of this rank's state
    rehearse: save, verify and load back a checkpoint before the first step, so that a save that cannot work fails at
        once
    mttf_hours: mean time between failures of the whole job, for every_steps = auto
    mirror: an absolute path or URL (s3://, gs://, az://) to which checkpoints are copied in the background, and from
        which a run is restored whose directory or whose checkpoints are gone; {run} stands for the run's name, which
        else comes last; null: none
    """

    every_steps: int | Literal["auto"] | None = 500
    every_minutes: float | None = None
    keep_last: int = 2
    keep_every_steps: int | None = None
    store_frozen: bool = False
    async_save: bool = True
    rehearse: bool = True
    mttf_hours: float | None = None
    mirror: str | None = None


def check(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Rules of this section alone."""
    for key, unit in (("every_steps", "step"), ("keep_every_steps", "step"), ("keep_last", "checkpoint")):
        value = getattr(checkpoint, key)
        if value is not None and value != "auto" and value < 1:
            yield Problem(f"checkpoint.{key}", value, f"1 {unit} or more" + (", or null" if key != "keep_last" else ""))
    if checkpoint.every_minutes is not None and checkpoint.every_minutes <= 0:
        yield Problem("checkpoint.every_minutes", checkpoint.every_minutes, "minutes above 0, or null")
    mttf, auto = checkpoint.mttf_hours, checkpoint.every_steps == "auto"
    if mttf is not None and mttf <= 0:
        yield Problem("checkpoint.mttf_hours", mttf, "hours above 0, or null")
    elif auto != (mttf is not None):
        expected = "hours, because checkpoint.every_steps = auto" if auto else "null unless every_steps = auto"
        fix = "Give the hours between two failures of the whole job, e.g. 24." if auto else "Take it away."
        yield Problem("checkpoint.mttf_hours", mttf, expected, fix, because=("checkpoint.every_steps",))
    yield from _mirror(checkpoint.mirror)


def _mirror(mirror: str | None) -> Iterator[Problem]:
    """What it looks like; whether its package is installed is asked where it is used."""
    if mirror is None:
        return
    key, expected = "checkpoint.mirror", "an absolute path, or a URL as s3://bucket/folder"
    scheme, mark, rest = mirror.partition("://")
    if not mark:
        if not mirror.startswith("/"):
            fix = "It must mean the same on every machine that starts the run: write the whole path."
            yield Problem(key, mirror, expected, fix)
            return
    elif scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        yield Problem(key, mirror, f"a URL that begins with one of {known}", nearest(scheme, STORES))
        return
    elif "@" in rest.partition("/")[0] and scheme != "abfs":
        fix = "Secrets are taken from the environment or the store's own configuration."
        yield Problem(key, mirror, f"{expected}, without a user or password in it", fix)
    if (mark and not rest.strip("/")) or mirror.strip("/") == "":
        yield Problem(key, mirror, expected, "Name a folder, or a bucket.")
    if other := [name for name in re.findall(r"\{([^}]*)\}", mirror) if name != "run"]:
        yield Problem(key, mirror, f"{{run}} alone in braces, for the run's name, not {{{other[0]}}}")
