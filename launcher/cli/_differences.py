"""What a run started last, and how a job that is rendered now differs from it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.cli._common import find_submitted
from launcher.errors import UserError

BESIDE_AN_ATTEMPT = ("provenance.json", "dirty.patch", "nodes.json", "preflight.json")  # what was found, not started


@dataclass(frozen=True, slots=True)
class Last:
    """A job as it was started.

    number: of its submission; files: name to text
    whole: whether these are all; beside an attempt that a target started lies what is the same for every target
    """

    number: int
    folder: Path
    files: Mapping[str, str]
    whole: bool


def last_job(run: str) -> Last:
    """What a run submitted last; where nothing was, what lies beside the attempt that it started last.

    Raises:
        UserError: it has started nothing.
    """
    from launcher.jobs.submissions import submissions
    from launcher.run.ledger import latest_attempt

    directory, place = find_submitted(run)
    if known := submissions(place):
        last = known[-1]
        return _read(run, last.number, last.job.folder, last.files, whole=True)
    folder = directory.job(latest_attempt(directory))
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name not in BESIDE_AN_ATTEMPT]
    return _read(run, 1, folder, names, whole=any(name.endswith(".sh") for name in names))


def _read(run: str, number: int, folder: Path, names: list[str] | tuple[str, ...], *, whole: bool) -> Last:
    found = {name: (folder / name).read_text() for name in names if (folder / name).is_file()}
    if not found:
        raise UserError(f"--diff {run}: it has started no job yet, so there is nothing to compare with.")
    return Last(number, folder, found, whole)


def differences(last: Last, now: Mapping[str, str]) -> dict[str, str]:
    """A unified diff of each file that differs."""
    names = [name for name in (*now, *last.files) if last.whole or (name in now and name in last.files)]
    found = {name: _difference(name, last.files.get(name), now.get(name)) for name in dict.fromkeys(names)}
    return {name: text for name, text in found.items() if text}


def _difference(name: str, old: str | None, new: str | None) -> str:
    before, after = ((text or "").splitlines(keepends=True) for text in (old, new))
    last = "/dev/null" if old is None else f"last/{name}"
    now = "/dev/null" if new is None else f"now/{name}"
    lines = difflib.unified_diff(before, after, last, now)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
