"""What was submitted of a run: a folder a submission, and one line each in `job/submissions.jsonl`.

They lie in the run directory, or, where that is on other machines only, below the user's state folder. Who is asked
about a job is the target's part.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import UserError
from launcher.jobs.job import Job
from launcher.jobs.spec import JobSpec
from launcher.run.directory import RunDirectory
from launcher.run.files import append_line, read_lines

_LOCAL_HOSTS = (None, "", "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One hand-over to a target. files: names of what was rendered; time: Unix seconds on `host`, for people only."""

    number: int
    job: Job
    time: float | None = None
    host: str = ""
    files: tuple[str, ...] = ()


def place_for(spec: JobSpec) -> Path:
    """Where a job's submissions lie: the run directory, or its stand-in here where only the nodes see that."""
    return state_folder(spec.name) if elsewhere(spec) else Path(spec.run)


def elsewhere(spec: JobSpec) -> bool:
    """Whether the run directory is not to be made on this machine: pods and a remote Ray cluster have their own."""
    target, ray = spec.cluster.target, spec.cluster.ray
    if target != "ray":
        return target == "kubernetes"
    address = ray.address or os.environ.get("RAY_ADDRESS") or "local"
    return "://" in address and urlsplit(address).hostname not in _LOCAL_HOSTS


def state_folder(name: str) -> Path:
    """What this user keeps here about a run whose directory is elsewhere; it need not exist."""
    return _states() / name


def known_elsewhere() -> list[tuple[RunDirectory, Path]]:
    """The runs that this user submitted to where their directory is not seen from here, each with its place."""
    places = sorted(_states().iterdir()) if _states().is_dir() else []
    last = ((place, latest(place)) for place in places)
    return [(run, place) for place, job in last if job is not None and not (run := RunDirectory(job.run)).exists()]


def _states() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "launcher", "runs")


@contextmanager
def one_at_a_time(place: Path) -> Iterator[None]:
    """Hold this while submitting, so that two commands at once do not both find nothing queued.

    Raises:
        UserError: another `launcher submit` of the run is at it, or nothing can be written there.
    """
    try:
        (place / "job").mkdir(parents=True, exist_ok=True)
        handle = os.open(place / "job" / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror or error}).") from None
    try:
        _lock(handle, place)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, place: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{place}: another `launcher submit` of this run is at work. Wait for its end.") from None


def next_number(place: Path) -> int:
    """The number of the next submission of a place, from 1."""
    folders = (place / "job").iterdir() if (place / "job").is_dir() else ()
    return 1 + max([0, *map(_number, folders), *(one.number for one in submissions(place))])


def new_folder(place: Path) -> Path:
    """A fresh `job/submission-N` below a place."""
    folder = place / "job" / f"submission-{next_number(place)}"
    folder.mkdir(parents=True)
    return folder


def record(place: Path, job: Job, *, files: Iterable[str] = ()) -> None:
    """Remember a job that was submitted, durably.

    files: names of the rendered ones among those in its folder
    """
    (place / "job").mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {
        "number": _number(job.folder) or len(submissions(place)) + 1, "target": job.target, "id": job.id,
        "time": time.time(), "host": socket.gethostname(), "folder": str(job.folder), "run": str(job.run),
        "more": dict(job.more), "files": list(files),
    }  # fmt: skip
    append_line(_file(place), line)


def submissions(place: Path) -> list[Submission]:
    """All of them, in the order of time; lines and fields of a later version are passed over."""
    found = (_submission(line, place) for line in read_lines(_file(place)))
    return [submission for submission in found if submission is not None]


def all(place: Path) -> list[Job]:
    """Every job that was submitted, the last one last."""
    return [submission.job for submission in submissions(place)]


def latest(place: Path) -> Job | None:
    """The job that was submitted last."""
    known = submissions(place)
    return known[-1].job if known else None


def _file(place: Path) -> Path:
    return place / "job" / "submissions.jsonl"


def _number(folder: Path) -> int:
    match = re.fullmatch(r"submission-(\d+)", folder.name)
    return int(match[1]) if match else 0


def _submission(line: dict[str, Any], place: Path) -> Submission | None:
    if not isinstance(line.get("target"), str) or not isinstance(line.get("id"), str):
        return None
    job = Job(
        target=line["target"],
        id=line["id"],
        folder=_moved(Path(line.get("folder", "")), place),
        run=Path(line.get("run") or place),
        more={str(key): str(value) for key, value in (line.get("more") or {}).items()},
    )
    return Submission(
        number=int(line.get("number") or 0),
        job=job,
        time=line.get("time"),
        host=str(line.get("host", "")),
        files=tuple(line.get("files") or ()),
    )


def _moved(folder: Path, place: Path) -> Path:
    """The folder of a submission where the run lies now."""
    here = place / "job" / folder.name
    return here if not folder.exists() and here.exists() else folder
