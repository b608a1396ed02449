"""Submitting a run: everything that is checked before, the files, the one call, and what is remembered of it.

Whatever refuses leaves nothing behind: no run, no folder, nothing queued.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.jobs import snapshot, submissions, targets
from launcher.jobs.asking import ask_one, settled
from launcher.jobs.job import ACTIVE, Finding, Job
from launcher.jobs.opening import open_run, owned, run_directory
from launcher.jobs.preparation import agrees
from launcher.jobs.spec import Rendered, job_spec
from launcher.plan import make_plan
from launcher.recipe.schema import Recipe
from launcher.run import provenance
from launcher.run.directory import RunDirectory
from launcher.run.lease import current_owner
from launcher.run.state import reached_end

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Submitted:
    """What was handed over. place: where it is remembered; findings: what validation said before."""

    job: Job
    place: Path
    findings: Sequence[Finding]


def submit(recipe: Recipe, *, force: bool, say: Say) -> Submitted | None:
    """Hand the job of a loaded recipe to its `cluster.target`; None where its run is finished, which is then said.

    force: go on even where the recipe has become that of another run

    Raises:
        UserError: something is wrong with it, or its last job is still queued or running; nothing is queued.
    """
    plan, run = make_plan(recipe), run_directory(recipe)
    spec, target = snapshot.planned(job_spec(recipe, plan)), targets.find(recipe.cluster.target)
    place = submissions.place_for(spec)
    if reached_end(run) and agrees(run, recipe):
        say(f"{run.path} is finished; a larger train.max_steps or train.epochs would lengthen it.")
        return None
    with undone_if_refused(place), submissions.one_at_a_time(place):
        require_idle(run, place)
        if not submissions.elsewhere(spec):
            with owned(run):
                open_run(run, recipe, plan, force=force, say=say)
        spec = replace(spec, submission=submissions.next_number(place))
        rendered = target.render(spec)
        with _folder(place, rendered) as folder:
            findings = list(target.validate(spec, rendered, folder))
            require_valid(findings, spec.cluster.target)
            snapshot.copy(spec)
            provenance.record(folder)
            job = target.submit(spec, rendered, folder)
        lost = _remember(place, job, rendered)
    if lost:  # behind what undoes a refusal: the job is there
        raise UserError(lost)
    return Submitted(job, place, findings)


def _remember(place: Path, job: Job, rendered: Rendered) -> str:
    """Why a job that is handed over could not be remembered; empty when it was."""
    try:
        submissions.record(place, job, files=rendered.files)
    except OSError as error:
        return (
            f"{place}: {job.target} job {job.id} is submitted, but that could not be written down "
            f"({error.strerror or error}). `launcher` cannot find it: end it there, mend the folder and submit again."
        )
    return ""


@contextmanager
def undone_if_refused(place: Path) -> Iterator[None]:
    """A place that was made for this submission goes again when nothing comes of it."""
    made, parents = not place.exists(), [folder for folder in place.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(place, ignore_errors=True)
            for folder in parents:
                with contextlib.suppress(OSError):  # somebody put something there
                    folder.rmdir()
        raise


@contextmanager
def _folder(place: Path, rendered: Rendered) -> Iterator[Path]:
    """A submission's folder with the rendered files; gone again when the submission is refused."""
    folder = submissions.new_folder(place)
    try:
        for name, text in rendered.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def require_idle(run: RunDirectory, place: Path) -> None:
    """Raises UserError where the last job is still to run, with its id and state."""
    job = submissions.latest(place)
    if job is None:
        return
    status = settled(job) or ask_one(job)  # the target may still be tidying up
    if status.state == "unknown" and current_owner(run)[1]:
        status = type(status)("running", status.reason)
    if status.state in ACTIVE:
        reason = f" ({status.reason})" if status.reason else ""
        raise UserError(
            f"{job.run} is submitted already: {job.target} job {job.id} is {status.state}{reason}.\n"
            f"  watch it:                   launcher status {job.run}\n"
            f"  stop it with a checkpoint:  launcher cancel {job.run}\n"
            "  train beside it:            give run.name another value"
        )


def require_valid(findings: Sequence[Finding], target: str) -> None:
    if bad := [f"  {finding.what}: {finding.text}" for finding in findings if finding.state == "bad"]:
        raise UserError("\n".join([f"{target} would refuse the job:", *bad]))
