"""A sweep: one recipe, some keys with several values, a run for each combination; on Slurm they are one array job."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import Problem, RecipeError, UserError
from launcher.jobs import snapshot, submissions, targets
from launcher.jobs.opening import open_run, owned, run_directory
from launcher.jobs.preparation import agrees
from launcher.jobs.spec import JobSpec, Rendered, bare_spec, job_spec
from launcher.jobs.submit import Submitted, require_idle, require_valid, submit, undone_if_refused
from launcher.plan import make_plan
from launcher.recipe.schema import Recipe
from launcher.run import provenance
from launcher.run.state import reached_end

Load = Callable[[Sequence[str]], Recipe]
Say = Callable[[str], None]
MOST = 1000  # runs; Slurm's default for the largest array is 1001
_KEY = re.compile(r"\w+(\.[\w/-]+)*")
_READABLE = re.compile(r"[A-Za-z0-9.+-]+")
_LONGEST_NAME = 63  # to be read in a list; Kubernetes takes fewer characters
_HERE = ("torchrun", "accelerate")  # these start a job on this machine at once


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--sweep KEY=A,B`: a dotted key and the values it takes, as written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepJob:
    """One of the jobs that a sweep hands over, as text.

    spec: of its first run; runs: names of all that it starts, an array's in the order of its elements
    folder: where its files lie among those of the sweep; empty: they are all that there is
    """

    spec: JobSpec
    rendered: Rendered
    runs: tuple[str, ...]
    folder: str


def parse(texts: Sequence[str]) -> list[Axis]:
    """The axes of a sweep.

    Raises:
        UserError: no KEY=VALUE,VALUE, a value or key twice, a key that is no matter of a sweep, too many runs.
    """
    axes: list[Axis] = []
    for text in texts:
        key, sign, rest = text.partition("=")
        values = tuple(_split(rest))
        if not sign or not _KEY.fullmatch(key) or not all(values):
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


def names(base: str, axes: Sequence[Axis], *, longest: int = _LONGEST_NAME) -> list[str]:
    """A name for each run: with its values, as base-lr-3e-5, or, where that reads badly, numbered from 0.

    longest: characters that such a name may have
    """
    chosen = [
        "-".join([base, *(word for change in changes for word in _words(change))]) for changes in combinations(axes)
    ]
    readable = all(_READABLE.fullmatch(value) for axis in axes for value in axis.values)
    if readable and len(set(chosen)) == len(chosen) and max(map(len, chosen)) <= longest:
        return chosen
    return [f"{base}-{number}" for number in range(len(chosen))]


def expand(load: Load, overrides: Sequence[str], axes: Sequence[Axis]) -> tuple[str, list[Recipe]]:
    """The sweep's name, which is what the run would be called without it, and a checked recipe for each run.

    load: overrides to a checked recipe

    Raises:
        UserError: a key is given by itself too.
        RecipeError: everything that `load` finds wrong with any of them, at the --sweep that it comes from.
    """
    for axis in axes:
        if given := [override for override in overrides if override.partition("=")[0] == axis.key]:
            raise UserError(f"--sweep: {axis.key} is given as {given[-1]} too. Leave one of them away.")
    changes = [[*overrides, *change] for change in combinations(axes)]
    try:
        first = load(changes[0])
    except RecipeError:
        _load_all(load, changes, axes)  # says it of the other values too
        raise
    base = first.run.name
    assert base is not None
    named = zip(changes, names(base, axes, longest=_longest_name(first)), strict=True)
    return base, _load_all(load, [[*change, f"run.name={name}"] for change, name in named], axes)


def render_sweep(recipes: Sequence[Recipe], *, name: str, say: Say) -> list[SweepJob]:
    """The jobs that `submit_sweep` would hand over now; nothing is written.

    Raises:
        UserError: they cannot be submitted as a sweep.
    """
    target = _target(recipes)
    left = [recipe for recipe in recipes if not _finished(recipe, say)]
    if _are_array(left):
        specs = _array_specs(left)
        return [SweepJob(specs[0], _rendered_array(specs, name), tuple(spec.name for spec in specs), "")]
    jobs = []
    for recipe in left:
        spec = snapshot.planned(job_spec(recipe, make_plan(recipe)))
        spec = replace(spec, submission=submissions.next_number(submissions.place_for(spec)))
        folder = "" if target == "slurm" else spec.name
        jobs.append(SweepJob(spec, targets.find(target).render(spec), (spec.name,), folder))
    return jobs


def submit_sweep(recipes: Sequence[Recipe], *, name: str, force: bool, say: Say) -> list[Submitted]:
    """Hand all runs over: one array job on Slurm, a job each on Ray and Kubernetes. Finished runs are left out.

    name: of the sweep

    Raises:
        UserError: one of them is refused. On Slurm nothing is queued then; elsewhere the text names what is.
    """
    _target(recipes)
    left = [recipe for recipe in recipes if not _finished(recipe, say)]
    if _are_array(left):
        return _submit_array(left, name=name, force=force, say=say)
    for recipe in left:  # before the first of them is handed over
        require_idle(run_directory(recipe), submissions.place_for(bare_spec(recipe)))
    found: list[Submitted] = []
    for recipe in left:
        try:
            one = submit(recipe, force=force, say=say)
        except UserError as error:
            raise UserError(f"{recipe.run.name}: {error}{_and_before(found)}") from None
        if one is not None:
            found.append(one)
    return found


def _and_before(submitted: Sequence[Submitted]) -> str:
    """What is queued when a later run of the sweep is refused."""
    if not submitted:
        return ""
    jobs = [f"  {one.job.run.name}: {one.job.target} job {one.job.id}" for one in submitted]
    return "\n".join(["\nSubmitted before it, and left so; launcher cancel NAME ends one:", *jobs])


def _target(recipes: Sequence[Recipe]) -> str:
    """The target of all; UserError where there is none that queues jobs."""
    wanted = sorted({recipe.cluster.target for recipe in recipes})
    if here := [target for target in wanted if target in _HERE]:
        raise UserError(
            f"--sweep: target {here[0]} starts its job on this machine at once, and {len(recipes)} would share its "
            "devices. Use --target slurm, ray or kubernetes, or launcher run, one after the other."
        )
    if len(wanted) > 1:
        raise UserError(
            f"--sweep: runs for {' and '.join(wanted)}: expected one target for all. Choose it by --target."
        )
    return wanted[0]


def _are_array(recipes: Sequence[Recipe]) -> bool:
    """Whether one array job starts them: Slurm's way; a run that is alone, or left alone, is a job like others."""
    return len(recipes) > 1 and recipes[0].cluster.target == "slurm"


def _array_specs(recipes: Sequence[Recipe]) -> list[JobSpec]:
    specs = [job_spec(recipe, make_plan(recipe)) for recipe in recipes]
    code = snapshot.planned(specs[0]).code  # one copy for all
    return [replace(spec, code=code) for spec in specs]


def _rendered_array(specs: Sequence[JobSpec], name: str) -> Rendered:
    from launcher.jobs.targets import slurm

    return slurm.render_sweep(specs, name=name)


def _load_all(load: Load, changes: Sequence[Sequence[str]], axes: Sequence[Axis]) -> list[Recipe]:
    """The recipes of a sweep; RecipeError with what is wrong with any of them, each problem once."""
    recipes: list[Recipe] = []
    problems: dict[str, Problem] = {}
    source = ""
    for overrides in changes:
        try:
            recipes.append(load(overrides))
        except RecipeError as error:
            source = error.source
            problems |= {str(problem): problem for problem in (_at_sweep(p, axes, overrides) for p in error.problems)}
    if problems:
        raise RecipeError(problems.values(), source)
    return recipes


def _at_sweep(problem: Problem, axes: Sequence[Axis], overrides: Sequence[str]) -> Problem:
    """The problem with the option in its place that a person has written, where `overrides` come from that."""
    kind, _, argument = problem.where.partition(" ")
    if kind != "argument":
        return problem
    if argument == overrides[-1] and argument.startswith("run.name="):
        return replace(problem, where="--sweep")
    if argument.partition("=")[0] in [axis.key for axis in axes]:
        return replace(problem, where=f"--sweep {argument}")
    return problem


def _longest_name(recipe: Recipe) -> int:
    if recipe.cluster.target != "kubernetes":
        return _LONGEST_NAME
    from launcher.jobs.targets.kubernetes_parts import longest_run_name

    return longest_run_name(bare_spec(recipe))


def _submit_array(recipes: Sequence[Recipe], *, name: str, force: bool, say: Say) -> list[Submitted]:
    from launcher.jobs.targets import slurm

    specs = _array_specs(recipes)
    places = [submissions.place_for(spec) for spec in specs]
    with ExitStack() as stack:
        for recipe, place in zip(recipes, places, strict=True):
            run = run_directory(recipe)
            stack.enter_context(undone_if_refused(place))
            stack.enter_context(submissions.one_at_a_time(place))
            require_idle(run, place)
            with owned(run):
                open_run(run, recipe, make_plan(recipe), force=force, say=say)
        rendered = _rendered_array(specs, name)
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
