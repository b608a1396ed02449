"""A sweep: one recipe, some keys with several values, a run for each combination; on Slurm they are one array job."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.jobs import snapshot, submissions
from launcher.jobs.opening import open_run, owned, run_directory
from launcher.jobs.preparation import agrees
from launcher.jobs.spec import JobSpec, job_spec
from launcher.jobs.submit import Submitted, require_idle, require_valid, submit, undone_if_refused
from launcher.plan import make_plan
from launcher.recipe.schema import Recipe
from launcher.run import provenance
from launcher.run.state import reached_end

Say = Callable[[str], None]
MOST = 1000  # runs; Slurm's default for the largest array is 1001
_READABLE = re.compile(r"[A-Za-z0-9.+-]+")
_LONGEST_NAME = 63  # so that every target takes it
_HERE = ("torchrun", "accelerate")  # these start a job on this machine at once


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--sweep KEY=A,B`: a dotted key and the values it takes, as written."""

    key: str
    values: tuple[str, ...]


def parse(texts: Sequence[str]) -> list[Axis]:
    """The axes of a sweep.

    Raises:
        UserError: no KEY=VALUE,VALUE, a value or key twice, a key that is no matter of a sweep, too many runs.
    """
    axes: list[Axis] = []
    for text in texts:
        key, sign, rest = text.partition("=")
        values = tuple(_split(rest))
        if not sign or not re.fullmatch(r"[\w.]+", key) or not all(values):
            raise UserError(f"--sweep {text}: expected KEY=VALUE,VALUE,... as optimizer.lr=1e-5,3e-5.")
        if len(set(values)) < len(values):
            raise UserError(f"--sweep {text}: expected each value once.")
        if key in [axis.key for axis in axes]:
            raise UserError(f"--sweep {text}: {key} is swept twice. Write all its values behind one --sweep.")
        if key == "run" or key.startswith("run."):
            raise UserError(f"--sweep {text}: expected a key of the training; each run is given its own name.")
        axes.append(Axis(key, values))
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST:
        raise UserError(f"--sweep: {count} runs: expected at most {MOST}. Sweep fewer keys or values at once.")
    return axes


def combinations(axes: Sequence[Axis]) -> list[list[str]]:
    """The overrides of each run; the last axis varies fastest."""
    keys = [axis.key for axis in axes]
    return [
        [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def names(base: str, axes: Sequence[Axis]) -> list[str]:
    """A name for each run: with its values, as base-lr-3e-5, or, where that reads badly, numbered from 0."""
    chosen = [
        "-".join([base, *(word for change in changes for word in _words(change))]) for changes in combinations(axes)
    ]
    readable = all(_READABLE.fullmatch(value) for axis in axes for value in axis.values)
    if readable and len(set(chosen)) == len(chosen) and max(map(len, chosen)) <= _LONGEST_NAME:
        return chosen
    return [f"{base}-{number}" for number in range(len(chosen))]


def expand(
    load: Callable[[Sequence[str]], Recipe], overrides: Sequence[str], axes: Sequence[Axis]
) -> tuple[str, list[Recipe]]:
    """The sweep's name, which is what the run would be called without it, and a checked recipe for each run.

    load: overrides to a checked recipe

    Raises:
        UserError: what `load` finds wrong with one of them.
    """
    changes = combinations(axes)
    base = load([*overrides, *changes[0]]).run.name
    assert base is not None
    named = zip(changes, names(base, axes), strict=True)
    return base, [load([*overrides, *change, f"run.name={name}"]) for change, name in named]


def submit_sweep(recipes: Sequence[Recipe], *, name: str, force: bool, say: Say) -> list[Submitted]:
    """Hand all runs over: one array job on Slurm, a job each on Ray and Kubernetes. Finished runs are left out.

    name: of the sweep

    Raises:
        UserError: one of them is refused; on Slurm nothing is queued then.
    """
    target = recipes[0].cluster.target
    if target in _HERE:
        raise UserError(
            f"--sweep: target {target} starts its job on this machine at once, and {len(recipes)} would share its "
            "devices. Use --target slurm, ray or kubernetes, or launcher run, one after the other."
        )
    if target != "slurm":
        return [one for recipe in recipes if (one := submit(recipe, force=force, say=say)) is not None]
    return _submit_array([recipe for recipe in recipes if not _finished(recipe, say)], name=name, force=force, say=say)


def _submit_array(recipes: Sequence[Recipe], *, name: str, force: bool, say: Say) -> list[Submitted]:
    from launcher.jobs.targets import slurm

    if not recipes:
        return []
    specs = [job_spec(recipe, make_plan(recipe)) for recipe in recipes]
    code = snapshot.planned(specs[0]).code  # one copy for all
    places = [submissions.place_for(spec) for spec in specs]
    with ExitStack() as stack:
        for recipe, place in zip(recipes, places, strict=True):
            run = run_directory(recipe)
            stack.enter_context(undone_if_refused(place))
            stack.enter_context(submissions.one_at_a_time(place))
            require_idle(run, place)
            with owned(run):
                open_run(run, recipe, make_plan(recipe), force=force, say=say)
        specs = [
            replace(spec, code=code, submission=submissions.next_number(place))
            for spec, place in zip(specs, places, strict=True)
        ]
        rendered = slurm.render_sweep(specs, name=name)
        with _folder(Path(specs[0].run).parent / f"{name}.sweep") as folder:
            for file, text in rendered.files.items():
                (folder / file).write_text(text)
            findings = list(slurm.validate(specs[0], rendered, folder))
            require_valid(findings, "slurm")
            snapshot.copy(specs[0])
            provenance.record(folder)
            jobs = slurm.submit_sweep(specs, rendered, folder)
        for job, place, number in zip(jobs, places, range(len(jobs)), strict=True):
            submissions.record(place, job, files=_files(specs[number], number))
    return [Submitted(job, place, findings) for job, place in zip(jobs, places, strict=True)]


def _files(spec: JobSpec, number: int) -> list[str]:
    """Names of one element's files in the folder of the sweep."""
    from launcher.jobs.targets.slurm import element_file
    from launcher.jobs.targets.slurm_script import FILE

    return [*(element_file(name, number) for name in spec.files), FILE]


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A fresh `sweep-N` below a folder; gone again when the submission is refused."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = (re.fullmatch(r"sweep-(\d+)", path.name) for path in parent.iterdir())
    folder = parent / f"sweep-{1 + max([0, *(int(match[1]) for match in numbers if match)])}"
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(parent.iterdir()):
            parent.rmdir()
        raise


def _finished(recipe: Recipe, say: Say) -> bool:
    run = run_directory(recipe)
    if not reached_end(run) or not agrees(run, recipe):
        return False
    say(f"{run.path} is finished and left out.")
    return True


def _words(change: str) -> tuple[str, str]:
    """`lr` and `3e-5` of optimizer.lr=3e-5."""
    key, _, value = change.partition("=")
    return key.rpartition(".")[2], value


def _split(text: str) -> Iterator[str]:
    """At commas that stand in no brackets, braces and quotes."""
    depth, quote, start = 0, "", 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()
