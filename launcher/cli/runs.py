"""`launcher runs`: one line a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from launcher.cli._common import RUNS_DIR, clock, columns, job_line, progress
from launcher.errors import UserError

_LONGEST_CELL = 100


@click.command("runs")
@click.argument("folder", metavar="[DIR]", default=RUNS_DIR)
@click.option("--no-ask", is_flag=True, help="Ask no scheduler how jobs stand.")
@click.option("--json", "as_json", is_flag=True, help="Print the shape of docs/json.md.")
def command(folder: str, no_ask: bool, as_json: bool) -> None:
    """List the runs in DIR with their states and jobs, the last changed first; changes nothing.   (default DIR: runs)

    Without DIR also those that were submitted from here to pods and Ray clusters with a file system of their own.

    example: launcher runs --json
    """
    from launcher.jobs.asking import summaries
    from launcher.jobs.submissions import known_elsewhere
    from launcher.run.summary import SUMMARY_VERSION, runs_in

    path = Path(folder)
    if not path.is_dir() and folder != RUNS_DIR:
        raise UserError(f"{folder}: no such folder. Give the folder that holds the runs (run.dir of the recipe).")
    there = [(run, run.path) for run in runs_in(path)]
    found = summaries([*there, *(known_elsewhere() if folder == RUNS_DIR else ())], ask_targets=not no_ask)
    found.sort(key=lambda summary: -(summary["updated"] or 0.0))
    if as_json:
        click.echo(json.dumps({"version": SUMMARY_VERSION, "dir": str(path.resolve()), "runs": found}, indent=2))
    elif not found:
        click.echo(f"no runs in {path}/")
    else:
        heading = ("run", "state", "step", "loss", "attempt", "changed", "job")
        click.echo(columns([heading, *(_row(summary) for summary in found)]))


def _row(summary: dict[str, Any]) -> tuple[str, ...]:
    loss = summary["loss"]
    return (
        summary["run"],
        summary["status"],
        progress(summary["step"], summary["total_steps"]),
        "-" if loss is None else f"{loss:.4f}",
        str(summary["attempt"]),
        clock(summary["updated"]),
        _cut(job_line(summary["job"])),
    )


def _cut(text: str) -> str:
    """A cell; `launcher status` says the whole of it."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."
