"""`launcher checkpoint list|verify|prune|repair`: a run's checkpoints as things to look after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli._common import RUNS_DIR, clock, columns, find_run
from launcher.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.care import Entry, Pruned
    from launcher.trainer.checkpoint.mirror import Mirror

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the shape of docs/json.md.")


@click.group(short_help="Look after a run's checkpoints: list, verify, prune, repair.")
def command() -> None:
    """Look after a run's checkpoints, also while it trains; needs neither a GPU nor torch."""


@command.command("list", short_help="Say what is there, and which one a resume would take.")
@click.argument("run")
@click.option("--verify", is_flag=True, help="Read and hash every byte, too: good or bad in place of committed.")
@_JSON
def list_(run: str, verify: bool, as_json: bool) -> None:
    """List a run's checkpoints with step, time, size, who wrote them and how they stand; change nothing.

    committed: it counts, its bytes were not read.  good, bad: all were.  void: an older attempt committed it after a
    newer one had begun.  unfinished: its marker is missing.  mirror: whole there, not here.

    example: launcher checkpoint list runs/quickstart
    """
    _require_packages()
    from launcher.trainer.checkpoint.care import entries, resumes_from
    from launcher.trainer.checkpoint.store import StoreError

    found_run = find_run(run)
    trouble = ""
    try:
        found = entries(found_run, verify=verify, mirror=_mirror(found_run))
    except StoreError as error:
        trouble = f"warning: the mirror cannot be reached: {error}"
        found = entries(found_run, verify=verify)
    takes = resumes_from(found)
    if as_json:
        shape = {"run": found_run.name, "path": str(found_run.path.resolve()), "resumes_from": takes}
        click.echo(json.dumps({**shape, "checkpoints": [asdict(entry) for entry in found]}, indent=2))
        return
    if trouble:
        click.echo(trouble, err=True)
    for line in _listed(found, takes):
        click.echo(line)


@command.command("verify", short_help="Read and hash every byte; name each file that is bad.")
@click.argument("run")
@click.argument("which", default="all", metavar="[STEP|NAME|all]")
@_JSON
def verify(run: str, which: str, as_json: bool) -> int:
    """Read every byte of a run's checkpoints once and compare its hash; change nothing.  (default: all)

    Ends with 1 when something is bad, each file named with what is wrong. A run that trains goes on undisturbed.

    example: launcher checkpoint verify runs/quickstart
    """
    _require_packages()
    from launcher.trainer.checkpoint.care import chosen, verified

    found_run = find_run(run)
    found = verified(found_run, chosen(found_run, which))
    ok = not any(entry.state == "bad" or (which != "all" and entry.state != "good") for entry in found)
    if as_json:
        shape = {"run": found_run.name, "path": str(found_run.path.resolve()), "ok": ok}
        click.echo(json.dumps({**shape, "checkpoints": [asdict(entry) for entry in found]}, indent=2))
    else:
        for line in _said(found) if found else (f"{found_run.path}: has no checkpoint yet",):
            click.echo(line)
        if not ok:
            click.echo(f"what to do: launcher checkpoint repair {found_run.path}")
    return 0 if ok else EXIT_FAILED


@command.command("prune", short_help="Delete checkpoints that are not to be kept.")
@click.argument("run")
@click.option(
    "--keep-last", type=click.IntRange(min=1), required=True, metavar="N", help="Keep the newest N good ones."
)
@click.option(
    "--keep-every", type=click.IntRange(min=1), metavar="N", help="Also keep those whose step is a multiple of N."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@_JSON
def prune(run: str, keep_last: int, keep_every: int | None, dry_run: bool, as_json: bool) -> None:
    """Delete a run's checkpoints but the newest and every so many; never one that is in use, nor the newest good one.

    The newest are verified first, and bad ones do not count. Of a run at rest, unfinished and void ones go as well.

    example: launcher checkpoint prune runs/quickstart --keep-last 1 --dry-run
    """
    _require_packages()
    from launcher.trainer.checkpoint.care import prune

    done = prune(find_run(run), keep_last=keep_last, keep_every_steps=keep_every, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, **asdict(done)}, indent=2))
    else:
        for line in _pruned(done, dry_run=dry_run):
            click.echo(line)


@command.command("repair", short_help="Take a run back to its newest good checkpoint.")
@click.argument("run")
@click.option(
    "--from", "source", metavar="PLACE",
    help="A copy of the run: a path, or a URL as s3://bucket/runs/NAME.  (default: checkpoint.mirror)",
)  # fmt: skip
@_JSON
def repair(run: str, source: str | None, as_json: bool) -> int:
    """Mend a run whose checkpoints are bad, so that it can go on; delete nothing, and start no training.

    Bad files are replaced by their copies in the mirror. What stays bad is put aside in checkpoints/bad with the
    reason, and the run goes on from the newest good one. A run that trains is refused. With --from, a run whose
    directory is gone is brought back. Ends with 1 where no checkpoint is good in the end; then none is put aside.

    example: launcher checkpoint repair runs/quickstart
    """
    _require_packages()
    from launcher.jobs.opening import owned
    from launcher.trainer.checkpoint.care import Repaired
    from launcher.trainer.checkpoint.care import repair as mend
    from launcher.trainer.checkpoint.mirror import AnotherRun
    from launcher.trainer.checkpoint.store import StoreError

    found_run, mirror = _to_repair(run, source)
    with owned(found_run, say=lambda text: click.echo(text, err=True)):
        try:
            done: Repaired = mend(found_run, mirror)
        except (StoreError, AnotherRun) as error:
            raise UserError(str(error)) from None
    if as_json:
        click.echo(json.dumps(asdict(done), indent=2))
        return 0 if done.ok else EXIT_FAILED
    for line in done.did:
        click.echo(line)
    if done.newest is not None:
        mended = "" if done.did else "nothing was to be mended: "
        click.echo(f"{mended}a resume goes on from {done.newest}")
    elif done.ok:
        click.echo(f"{found_run.path}: has no checkpoint; a resume begins at its first step")
    else:
        click.echo("no checkpoint is good, so nothing was put aside. Give another copy of the run: --from PLACE")
    return 0 if done.ok else EXIT_FAILED


def _to_repair(text: str, source: str | None) -> tuple[RunDirectory, Mirror | None]:
    """The run, which need not be here when its copy is given, and its copy."""
    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.mirror import Mirror
    from launcher.trainer.checkpoint.store import StoreError

    if source is None:
        found = find_run(text)
        return found, _mirror(found)
    if "://" not in source:
        source = str(Path(source).absolute())
    try:
        run = find_run(text)
    except UserError:
        run = RunDirectory(Path(text) if "/" in text else Path(RUNS_DIR, text))
        try:
            if Mirror(run, source).run_id() is None:
                raise UserError(f"--from {source}: holds no run (no run.json), and {text} is none either.") from None
        except StoreError as error:
            raise UserError(f"--from {error}") from None
    return run, Mirror(run, source)


def _mirror(run: RunDirectory) -> Mirror | None:
    from launcher.recipe.schema import from_dict
    from launcher.trainer.checkpoint.mirroring import open_mirror

    return open_mirror(run, from_dict(run.read_recipe()).checkpoint) if run.recipe_file.exists() else None


def _require_packages() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("numpy", "xxhash") if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed: pip install 'train-launcher[train]'")


def _listed(found: list[Entry], takes: str | None) -> Iterator[str]:
    if not found:
        yield "no checkpoint yet"
        return
    mirrored = any(entry.mirrored is not None for entry in found)
    heading = ("checkpoint", "step", "attempt", "committed", "size", "ranks", "strategy", "state")
    rows = [_cells(entry, takes, mirrored=mirrored) for entry in found]
    yield columns([(*heading, "mirror", "") if mirrored else (*heading, ""), *rows])
    for entry in found:
        if entry.state not in ("committed", "good", "mirror"):
            yield from entry.problems


def _cells(entry: Entry, takes: str | None, *, mirrored: bool) -> tuple[str, ...]:
    from launcher.plan.disk import size_text

    size = size_text(entry.bytes) if entry.bytes else "-"
    ranks, strategy = str(entry.ranks or "-"), entry.strategy or "-"
    cells = (entry.name, str(entry.step), str(entry.attempt), clock(entry.time), size, ranks, strategy, entry.state)
    mark = "<- a resume goes on from here" if entry.name == takes else ""
    return (*cells, "yes" if entry.mirrored else "no", mark) if mirrored else (*cells, mark)


def _said(found: list[Entry]) -> Iterator[str]:
    from launcher.plan.disk import size_text

    for entry in found:
        if entry.state == "good":
            yield f"{entry.name}: good ({size_text(entry.bytes)}, {entry.ranks} ranks)"
        elif entry.state == "gone":
            yield f"{entry.name}: deleted meanwhile, as its run keeps newer ones"
        else:
            yield from (f"{entry.state}: {problem}" for problem in entry.problems)


def _pruned(done: Pruned, *, dry_run: bool) -> Iterator[str]:
    from launcher.plan.disk import size_text

    for name in done.bad:
        yield f"{name}: bad, left for `launcher checkpoint repair`"
    for name in done.in_use:
        yield f"{name}: in use, left"
    would = "would be " if dry_run else ""
    for name in done.deleted:
        yield f"{name}: {would}deleted"
    yield f"{size_text(done.freed)} {would}freed; what stays: {', '.join(done.kept) or 'nothing'}"
