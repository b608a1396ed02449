"""`launcher data`: what can be asked of a recipe's data; `stats` counts what its stores hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from launcher.errors import UserError

_BAR = 40  # characters of the longest bar


@click.group(short_help="Ask a recipe's data: stats counts lengths, sources, what is trained or lost.")
def command() -> None:
    """Ask a recipe's data."""


@command.command("stats", short_help="Count what the stores of a recipe hold.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one object (docs/json.md).")
@click.option("-o", "--output", metavar="DIR", help="Write the picture of lengths, NAME-lengths.png, into this folder.")
def stats(recipe: str, overrides: tuple[str, ...], as_json: bool, output: str | None) -> None:
    """Count lengths, tokens of each source, what is trained, doubled, cut and left out; prepares the data if need be.

    Trains nothing, and tokenises nothing that is in the store already.  (default: text, without a picture)

    example: launcher data stats recipes/tiny-cpu.yaml -o pictures
    """
    from launcher.cli.prepare import progress_shown
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    require_train_extra()
    if loaded.data.streaming:
        raise UserError("data.streaming = true: a stream has no store that could be counted. Set it to false for this.")
    from launcher.data.prepare import prepare
    from launcher.data.stats import draw, statistics
    from launcher.run.data import remarks

    with progress_shown() as progress:
        prepared = prepare(loaded, progress=progress)
    found = statistics(loaded, prepared)
    picture = None if output is None else Path(output) / f"{Path(recipe).stem}-lengths.png"
    if picture is not None:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw(found, prepared, picture)
        except OSError as error:
            raise UserError(f"-o {output}: cannot be written: {error.strerror}.") from error
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for line in (*told(found), *remarks(prepared.to_dict())):
        click.echo(line)
    if picture is not None:
        click.echo(f"picture  {picture}")


def told(found: dict[str, Any]) -> Iterator[str]:
    """The counts for people."""
    from launcher.cli._common import columns

    train = found["train"]
    rows = [_HEADING, *(_cells(source) for source in train["sources"])]
    if len(train["sources"]) > 1:
        rows.append(_cells({**train, "name": "all"}))
    for one in (found["eval"] or {}).get("sets", []):
        rows.append(_cells({**one, "name": f"eval: {one['name']}"}))
    yield columns(rows)
    yield ""
    lengths = train["lengths"]
    yield f"lengths  mean {lengths['mean']:,.1f}; " + ", ".join(
        f"{name} {value:,}" for name, value in lengths.items() if name != "mean"
    )
    yield from _bars(train["histogram"])
    groups = train["groups"]
    if groups["pairs"] or groups["labelled"]:
        yield f"groups  {groups['plain']:,} plain documents, {groups['pairs']:,} pairs, {groups['labelled']:,} labelled"


_HEADING = (
    "source", "documents", "tokens", "trained", "share", "seen", "rows", "efficiency", "duplicates", "median", "p95",
    "longest",
)  # fmt: skip


def _cells(source: dict[str, Any]) -> tuple[str, ...]:
    lengths = source["lengths"]
    share = f"{source['share']:.1%}" if "share" in source else ""
    seen = f"{source['epochs']:.3g}x" if "epochs" in source else ""
    return (
        source["name"], f"{source['documents']:,}", f"{source['tokens']:,}", f"{source['trained_share']:.1%}", share,
        seen, f"{source['rows']:,}", f"{source['packing_efficiency']:.2%}", f"{source['duplicates']:,}",
        *(f"{lengths[key]:,}" if lengths else "" for key in ("p50", "p95", "max")),
    )  # fmt: skip


def _bars(histogram: dict[str, list[int]]) -> Iterator[str]:
    """The histogram as text, two of its bins a line."""
    edges, counts = histogram["edges"], histogram["documents"]
    begins, ends = edges[:-1:2], [*edges[2::2], *([edges[-1]] if len(counts) % 2 else [])]
    heights = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    width, tallest = len(f"{edges[-1]:,}"), max(*heights, 1)
    for begin, end, height in zip(begins, ends, heights, strict=True):
        bar = "#" * -(-height * _BAR // tallest)
        yield f"  {begin:>{width},} to {end - 1:>{width},}  {bar:<{_BAR}}  {height:,}"
