"""`launcher submit`: hands the job that `launcher render` shows to its target."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from launcher.cli._common import load_for_target, load_sweep

if TYPE_CHECKING:
    from launcher.jobs.submit import Submitted

VERSION = 1


@click.command(short_help="Hand a run's job to a scheduler, or start it in the background.")
@click.argument("recipe", metavar="RECIPE|RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--target", help="torchrun, accelerate, slurm, ray or kubernetes.  [default: cluster.target]")
@click.option("--sweep", multiple=True, metavar="KEY=A,B,...", help="A run for each value; several: each combination.")
@click.option("--wait", is_flag=True, help="Follow the job to its end, and end with its code as `launcher run` does.")
@click.option("--force", is_flag=True, help="Go on even where the recipe has become that of another run.")
@click.option("--json", "as_json", is_flag=True, help="Print one object (docs/json.md).")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    target: str | None,
    sweep: tuple[str, ...],
    wait: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Submit a recipe, or a run that is to go on, after every check; wait for nothing unless told to.

    What is submitted is what `launcher render` shows, kept in the run's job/submission-N. A run whose last job is
    still queued or running is refused. Targets torchrun and accelerate start the job in the background on this
    machine. A sweep is one array job on Slurm, a job for each run on Ray and Kubernetes.

    \b
    example: launcher submit recipes/tiny-cpu.yaml train.max_steps=50
    example: launcher submit runs/big cluster.time_limit_min=720 --target slurm --wait
    example: launcher submit recipes/llama3.1-8b-fsdp2.yaml --target slurm --sweep optimizer.lr=1e-5,3e-5
    """
    if sweep:
        return _sweep(recipe, overrides, target, sweep, wait=wait, force=force, as_json=as_json)
    from launcher.jobs.submit import submit

    submitted = submit(
        load_for_target(recipe, overrides, target), force=force, say=lambda text: click.echo(text, err=as_json)
    )
    if submitted is None:
        return 0
    click.echo(json.dumps(_object(submitted), indent=2) if as_json else _text(submitted))
    if not wait:
        return 0
    from launcher.jobs.following import follow

    try:
        return follow(submitted.job, lambda text: click.echo(text, err=as_json))
    except KeyboardInterrupt:
        click.echo(f"the job goes on; it is stopped by: launcher cancel {submitted.job.run}", err=True)
        return 130


def _sweep(
    recipe: str,
    overrides: tuple[str, ...],
    target: str | None,
    texts: tuple[str, ...],
    *,
    wait: bool,
    force: bool,
    as_json: bool,
) -> int:
    from launcher.errors import UserError
    from launcher.jobs.sweep import submit_sweep

    if wait:
        raise UserError("--wait: follows one job, not those of --sweep. Look with `launcher runs`.")
    name, recipes = load_sweep(recipe, overrides, target, texts)
    submitted = submit_sweep(recipes, name=name, force=force, say=lambda text: click.echo(text, err=as_json))
    if as_json:
        click.echo(json.dumps({"version": VERSION, "runs": [_object(one) for one in submitted]}, indent=2))
    else:
        for one in submitted:
            click.echo(f"submitted {one.job.run}: {one.job.target} job {one.job.id}")
        for folder in dict.fromkeys(one.job.folder for one in submitted):
            click.echo(f"  files:  {folder}")
        if submitted:
            click.echo(f"  look:   launcher runs {_runs_folder(submitted[0])}".rstrip())
            click.echo("\n".join(_stop(submitted)))
    return 0


def _stop(submitted: Sequence[Submitted]) -> Iterator[str]:
    """How a person ends the runs of a sweep: each by itself, an array also at once."""
    first = submitted[0]
    name = first.job.run if first.place == first.job.run else first.job.run.name
    yield f"  stop:   launcher cancel {name}" + (", and so each of the others" if len(submitted) > 1 else "")
    array, sign, _ = first.job.id.partition("_")
    if first.job.target == "slurm" and sign:
        from launcher.jobs.targets.slurm_states import of_cluster

        yield f"          {shlex.join(['scancel', *of_cluster(first.job.more.get('cluster')), array])}  (all at once)"


def _runs_folder(submitted: Submitted) -> str:
    """What `launcher runs` is to list; empty where this machine does not see it."""
    return str(submitted.job.run.parent) if submitted.place == submitted.job.run else ""


def _object(submitted: Submitted) -> dict[str, object]:
    job = submitted.job
    return {
        "version": VERSION, "run": job.run.name, "path": str(job.run), "place": str(submitted.place),
        "target": job.target, "id": job.id, "folder": str(job.folder), "more": dict(job.more),
        "validation": [asdict(finding) for finding in submitted.findings],
    }  # fmt: skip


def _text(submitted: Submitted) -> str:
    job = submitted.job
    name = job.run if submitted.place == job.run else job.run.name
    lines = [
        *(f"{f.what}: not looked at: {f.text}" for f in submitted.findings if f.state == "skipped"),
        f"submitted {job.run}: {job.target} job {job.id}",
        f"  files:  {job.folder}",
        f"  look:   launcher status {name}",
        f"          launcher logs {name} --job",
        f"  stop:   launcher cancel {name}",
    ]
    return "\n".join(lines)
