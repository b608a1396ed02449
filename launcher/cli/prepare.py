"""`launcher prepare`: makes the data store of a recipe, with a progress bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from launcher.data.prepare import Prepared


@click.command(short_help="Tokenise and pack a recipe's data into the store.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--json", "as_json", is_flag=True, help="Print what data.json would hold.")
@click.option("--strict", is_flag=True, help="A record that would be dropped, cut or repaired is an error.")
@click.option("--shards", metavar="I/N", help="Only tokenise the shards I, I + N, I + 2 N, ...; pack nothing.")
@click.option("--target", help="Print the jobs that do it beyond this machine: slurm or ray.")
@click.option(
    "-n", "shares", type=click.IntRange(min=1), help="With --target: jobs that tokenise.  [default: cluster.nodes]"
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="With --target: write the files into this folder."
)
@click.option("--submit", is_flag=True, help="With --target: hand the jobs over.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    strict: bool,
    shards: str | None,
    target: str | None,
    shares: int | None,
    output: Path | None,
    submit: bool,
) -> None:
    """Tokenise and pack the data of a recipe; start no training, need no GPU. What is already made is only opened.

    Beyond this machine: jobs that each tokenise a share of the shards into the cache folder, which all machines have
    to share, and one that packs behind them. The result is the same, byte for byte.

    \b
    example: launcher prepare recipes/tiny-cpu.yaml data.num_workers=8
    example: launcher prepare recipes/llama3.1-8b-pretrain.yaml cluster.slurm.partition=cpu --target slurm -n 16 -o job
    """
    if target is None and (given := [name for name, value in _only(shares, output, submit) if value]):
        raise UserError(f"{given[0]}: expected with --target slurm or ray.")
    if target is not None:
        if given := [
            name for name, value in (("--json", as_json), ("--strict", strict), ("--shards", shards)) if value
        ]:
            raise UserError(f"{given[0]}: expected without --target, whose jobs are plain calls of launcher prepare.")
        _beyond(recipe, overrides, target, shares, output, submit=submit)
        return
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    require_train_extra()
    if shards is not None:
        from launcher.data.parallel import Share, prepare_share

        share = Share.parse(shards)
        with progress_shown() as progress:
            prepare_share(loaded, share, progress)
        click.echo(f"share {share.number} of {share.of} is tokenised; when all are: launcher prepare {recipe}")
        return
    from launcher.data.prepare import prepare

    with progress_shown() as progress:
        prepared = prepare(loaded, progress=progress, strict=strict)
    if as_json:
        click.echo(json.dumps(prepared.to_dict(), indent=2))
        return
    for line in summary(prepared):
        click.echo(line)


def _only(shares: int | None, output: Path | None, submit: bool) -> Iterator[tuple[str, object]]:
    """Options that are about --target."""
    yield from (("-n", shares), ("-o", output), ("--submit", submit))


def _beyond(
    recipe: str, overrides: tuple[str, ...], target: str, shares: int | None, output: Path | None, *, submit: bool
) -> None:
    """The jobs of a target: printed, written, or handed over from the folder that is written."""
    from launcher.cli._common import load_for_target
    from launcher.jobs import shards

    loaded = load_for_target(recipe, overrides, target)
    job = shards.render(loaded, shares=shares)
    if output is None and not submit:
        for name, text in job.rendered.files.items():
            click.echo(f"==> {name} <==\n{text}")
        click.echo(f"launcher prepare {recipe} --target {target} -o DIR, then in DIR: {job.rendered.command}")
        return
    folder = output or shards.new_folder(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in job.rendered.files.items():
        (folder / name).write_text(text)
    click.echo(f"wrote {', '.join(sorted(job.rendered.files))} into {folder}")
    for line in shards.submit(job, folder) if submit else [f"cd {folder}", job.rendered.command]:
        click.echo(line)


def summary(prepared: Prepared) -> Iterator[str]:
    """What was found or made, for people."""
    from launcher.run.data import remarks

    values = prepared.to_dict()
    for role, key in (("train", "sources"), ("eval", "sets")):
        if (entry := values[role]) is not None:
            yield from _role_lines(role, entry, entry[key])
    yield from remarks(values)
    if prepared.steps_per_epoch is None:
        yield f"steps  {prepared.total_steps:,} of {prepared.global_batch_size:,} rows"
        return
    yield (
        f"steps  {prepared.total_steps:,} of {prepared.global_batch_size:,} rows; "
        f"an epoch is {prepared.steps_per_epoch:.4g} steps"
    )


def _role_lines(role: str, entry: dict[str, Any], parts: list[dict[str, Any]]) -> Iterator[str]:
    """Each source or set, then all together where there are several."""
    yield from (f"{role}  {line}" for line in entry["formats"])
    if entry.get("streaming"):
        return
    for part in parts:
        name = f"{role} {part['name']}" if len(parts) > 1 else role
        yield f"{name}  {_holds(part)}"
        if len(parts) > 1 and role == "train":
            yield f"{name}  {part['share']:.1%} of an epoch: {part['epoch_rows']:,} rows"
        yield f"{name}  store {part['store']}"
    if len(parts) > 1:
        yield f"{role}  together {_holds(entry)}"


def _holds(entry: dict[str, Any]) -> str:
    groups = entry["groups"]
    units = {"pairs": "pairs", "labelled": "labelled answers"}
    apart = "".join(f", {groups[kind]:,} {words}" for kind, words in units.items() if groups[kind])
    return (
        f"{entry['rows']:,} rows of {entry['documents']:,} documents{apart}, {entry['tokens']:,} tokens "
        f"({entry['trained_tokens']:,} trained), packing efficiency {entry['packing_efficiency']:.2%}"
    )


@contextmanager
def progress_shown() -> Iterator[Callable[[str, int, int], None]]:
    """What to hand to `prepare`: a bar on a terminal; elsewhere a line on stderr when work has moved on."""
    import sys

    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)


class _Bar:
    """One bar at a time, a new one for each kind of work."""

    def __init__(self, progress: RichProgress) -> None:
        self._progress = progress
        self._what = "looking at the data"
        self._task = progress.add_task(self._what, total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._progress.remove_task(self._task)
            self._what, self._task = what, self._progress.add_task(what, total=None)
        self._progress.update(self._task, completed=done, total=total or None)


class _Lines:
    """Plain lines: one for each kind of work, then one for each tenth of it."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = (what, done * 10 // total if total else 0)
        if now != self._last:
            self._last = now
            click.echo(f"{what}: {done} of {total} shards" if total else what, err=True)
