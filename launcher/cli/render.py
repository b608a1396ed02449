"""`launcher render`: the complete dry run of a submission, what changed since the last one, or why each setting."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli._common import load_for_target, load_sweep
from launcher.cli._differences import Last, differences, last_job
from launcher.errors import EXIT_FINISHED, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from launcher.jobs.job import Finding
    from launcher.jobs.spec import JobSpec, Rendered
    from launcher.jobs.sweep import SweepJob
    from launcher.plan import Plan
    from launcher.recipe.schema import Recipe
    from launcher.strategy.explained import Explained


@click.command(short_help="Print the job a recipe would submit; submit nothing.")
@click.argument("recipe", metavar="RECIPE|RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--target", help="torchrun, accelerate, slurm, ray or kubernetes.  [default: cluster.target]")
@click.option("--sweep", multiple=True, metavar="KEY=A,B,...", help="What `submit` with it would hand over.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the files into this folder instead.")
@click.option("--diff", "against", metavar="RUN", help="Print only what differs from what that run started last.")
@click.option(
    "--crds", metavar="DIR", help="For kubernetes: check the job against the CRDs in DIR  [LAUNCHER_CRD_DIR]."
)
@click.option("--explain", is_flag=True, help="Print each engine setting and why it is so, in place of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print one object (docs/json.md).")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    target: str | None,
    sweep: tuple[str, ...],
    output: Path | None,
    against: str | None,
    crds: str | None,
    explain: bool,
    as_json: bool,
) -> int:
    """Print the job a recipe, or a run that is to go on, would submit: its files, environment, what the target's own
    checks say, and the command. Start nothing, need no GPU, write files only with -o.

    Ends with 2 where the target would refuse it.

    \b
    example: launcher render recipes/llama3.1-8b-fsdp2.yaml cluster.nodes=4 --target slurm -o job
    example: launcher render recipes/llama3.1-8b-fsdp2.yaml --target slurm --sweep optimizer.lr=1e-5,3e-5
    example: launcher render runs/big cluster.nodes=4 --diff runs/big
    example: launcher render recipes/llama3.1-8b-fsdp2.yaml strategy=zero3 --explain
    """
    from launcher.jobs.snapshot import planned
    from launcher.jobs.spec import job_spec
    from launcher.jobs.submissions import next_number, place_for
    from launcher.jobs.targets import find
    from launcher.plan import make_plan

    if against is not None and (explain or output is not None):
        raise UserError("--diff prints differences and nothing else: leave -o and --explain away.")
    if sweep and (explain or against is not None):
        raise UserError("--sweep: --diff and --explain are about one run. Give its values as KEY=VALUE instead.")
    if crds is not None:
        os.environ["LAUNCHER_CRD_DIR"] = crds
    if sweep:
        name, recipes = load_sweep(recipe, overrides, target, sweep)
        _require_crds_are_read(crds, recipes[0])
        return _sweep(name, recipes, output, as_json)
    loaded = load_for_target(recipe, overrides, target)
    _require_crds_are_read(crds, loaded)
    plan = make_plan(loaded)
    spec, module = planned(job_spec(loaded, plan)), find(loaded.cluster.target)
    if against is not None:
        last = last_job(against)
        _print_differences(last, module.render(replace(spec, submission=last.number)).files, against, as_json)
        return EXIT_FINISHED
    spec = replace(spec, submission=next_number(place_for(spec)))
    rendered = module.render(spec)
    reasons = _reasons(loaded, plan) if explain else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        if output is not None or not explain:
            _write(folder, rendered.files)
        findings = [] if explain else list(module.validate(spec, rendered, folder))
    if as_json:
        click.echo(json.dumps(_object(spec, rendered, findings, reasons), indent=2))
    elif explain:
        for file, settings in reasons.items():
            click.echo(f"==> {file} <==\n{_table(settings)}\n")
    elif output is not None:
        click.echo("\n".join([f"wrote {_names(rendered.files)}", *_said(findings), f"cd {output}", rendered.command]))
    else:
        _print_whole(spec, rendered, findings)
    return EXIT_USER_ERROR if any(finding.state == "bad" for finding in findings) else EXIT_FINISHED


def _require_crds_are_read(crds: str | None, recipe: Recipe) -> None:
    if crds is not None and recipe.cluster.target != "kubernetes":
        raise UserError(f"--crds {crds}: only target kubernetes has CRDs, this job is for {recipe.cluster.target}.")


def _sweep(name: str, recipes: Sequence[Recipe], output: Path | None, as_json: bool) -> int:
    """As `command` for one run; where each run is a job, its files lie in a folder of its name."""
    from launcher.jobs.sweep import render_sweep

    jobs = render_sweep(recipes, name=name, say=lambda text: click.echo(text, err=True))
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(output or scratch, job.folder) for job in jobs]
        findings = [_written_and_validated(job, folder) for job, folder in zip(jobs, folders, strict=True)]
        if jobs and jobs[0].folder:
            _name_others(folders[0].parent, [job.folder for job in jobs])
    if as_json:
        shown = [_sweep_object(job, found) for job, found in zip(jobs, findings, strict=True)]
        click.echo(json.dumps({"sweep": name, "jobs": shown}, indent=2))
    for job, folder, found in zip(jobs, folders, findings, strict=True) if not as_json else ():
        if output is None:
            _print_whole(job.spec, job.rendered, found, folder=job.folder)
        else:
            wrote = [f"wrote {_names(job.rendered.files)}", *_said(found)]
            click.echo("\n".join([*wrote, f"(cd {folder} && {job.rendered.command})"]))
    return EXIT_USER_ERROR if any(one.state == "bad" for found in findings for one in found) else EXIT_FINISHED


def _written_and_validated(job: SweepJob, folder: Path) -> list[Finding]:
    from launcher.jobs.targets import find

    _write(folder, job.rendered.files)
    return list(find(job.spec.cluster.target).validate(job.spec, job.rendered, folder))


def _sweep_object(job: SweepJob, findings: Sequence[Finding]) -> dict[str, Any]:
    return {"runs": list(job.runs), "folder": job.folder, **_object(job.spec, job.rendered, findings, {})}


def _print_whole(spec: JobSpec, rendered: Rendered, findings: Sequence[Finding], *, folder: str = "") -> None:
    """folder: the part of a sweep's files that are this job's"""
    within, of = (f"{folder}/", f"{folder}: ") if folder else ("", "")
    for name, text in rendered.files.items():
        click.echo(f"==> {within}{name} <==\n{text}")
    click.echo("\n".join([f"==> {of}environment <==", *_environment(spec), ""]))
    click.echo("\n".join([f"==> {of}validation <==", *_said(findings), ""]))
    click.echo(f"==> {of}command <==\n{rendered.command}" + ("\n" if folder else ""))


def _environment(spec: JobSpec) -> Iterator[str]:
    """What the job's processes get by name; a secret's value is nowhere."""
    if not spec.env and not spec.env_names:
        yield "(nothing beside what the files set)"
    yield from (f"{name}={value}" for name, value in sorted(spec.env.items()))
    yield from (f"{name}  (named by cluster.env; its value is never written)" for name in spec.env_names)


def _said(findings: Sequence[Finding]) -> list[str]:
    """A line a finding."""
    return [f"{finding.state:<7}  {finding.what}: {finding.text}".rstrip(": ") for finding in findings]


def _names(files: Iterable[str]) -> str:
    """Names of files; only the first and the last where there are very many."""
    names = list(files)
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:5])} ... {names[-1]} ({len(names)} files)"


def _object(
    spec: JobSpec, rendered: Rendered, findings: Sequence[Finding], reasons: Mapping[str, Explained]
) -> dict[str, Any]:
    printed: dict[str, Any] = {
        "target": spec.cluster.target,
        "command": rendered.command,
        "files": dict(rendered.files),
        "environment": {"set": dict(spec.env), "taken": list(spec.env_names)},
        "validation": [asdict(finding) for finding in findings],
    }
    if reasons:
        printed["explain"] = {file: _pairs(settings) for file, settings in reasons.items()}
    return printed


def _print_differences(last: Last, new: Mapping[str, str], run: str, as_json: bool) -> None:
    found = differences(last, new)
    if as_json:
        click.echo(json.dumps({"against": str(last.folder), "diff": found}, indent=2))
    elif found:
        click.echo("".join(found.values()), nl=False)
    else:
        click.echo(f"the same as {run} has started last ({last.folder})")


def _reasons(recipe: Recipe, plan: Plan) -> dict[str, Explained]:
    """File of the job -> its settings with their reasons; every file that a strategy decides."""
    from launcher.strategy import accelerate, explain, settings_file

    found = {settings_file(recipe): explain(recipe, plan)}
    if recipe.cluster.target == "accelerate":
        found["accelerate.yaml"] = accelerate.explain(recipe, plan)
    return found


def _pairs(settings: Explained) -> dict[str, dict[str, object]]:
    return {key: {"value": value, "reason": reason} for key, (value, reason) in settings.items()}


def _table(settings: Explained) -> str:
    """A line a setting: key, value as the file has it, reason."""
    rows = [(key, json.dumps(value), reason) for key, (value, reason) in settings.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for key, value, reason in rows)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be written ({error.strerror})") from None
    _name_others(folder, files)


def _name_others(folder: Path, own: Iterable[str]) -> None:
    """Say what else lies there: scripts of an earlier `render` would start another job beside this recipe."""
    there = (path for path in folder.iterdir() if path.is_file() or (path / "recipe.yaml").is_file())
    if others := sorted({path.name for path in there} - set(own)):
        click.echo(f"{folder} has files from before that are no part of this job: {_names(others)}", err=True)
