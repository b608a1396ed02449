"""`launcher status`: how one run stands, its attempts, and what went wrong where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from launcher.cli._common import clock, columns, find_run, progress


@click.command("status")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the shape of docs/json.md.")
def command(run: str, as_json: bool) -> None:
    """Say how a run stands: state, step, attempts, the first failing rank; changes nothing.

    RUN is a path, or a name below runs/.

    example: launcher status runs/quickstart
    """
    from launcher.run.summary import summarise

    summary = summarise(find_run(run))
    click.echo(json.dumps(summary, indent=2) if as_json else "\n".join(_lines(summary)))


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    at = "" if summary["loss_step"] == summary["step"] else f" at step {summary['loss_step']}"
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}{at}"
    step = f"step {progress(summary['step'], summary['total_steps'])}{loss}"
    yield f"run         {summary['run']} ({summary['path']})"
    yield f"state       {summary['status']}, {step}; {clock(summary['updated'])}"
    if remark := _remark(summary):
        yield f"            {remark}"
    if summary["stop_requested"] is not None:
        yield f"stop asked  {summary['stop_requested'] or 'no reason given'}"
    checkpoint = summary["last_checkpoint"]
    yield f"checkpoint  {Path(checkpoint['path']).name if checkpoint else 'none yet'}"
    if summary["attempts"]:
        yield ""
        heading = ("attempt", "started", "target", "job", "reason", "step", "ended")
        yield columns([heading, *(_attempt(attempt) for attempt in summary["attempts"])])
    if failure := summary["failure"]:
        yield ""
        yield from _failure(failure)


def _remark(summary: dict[str, Any]) -> str:
    owner = summary["owner"]
    if summary["status"] == "interrupted":
        return f"its launcher is gone without a last word; `launcher resume {summary['path']}` goes on"
    if summary["status"] == "unknown":
        return f"its launcher, pid {owner['pid']}, cannot be seen from here; ask on {owner['host']}"
    if owner and owner["alive"]:
        return f"on {owner['host']}, pid {owner['pid']}"
    return ""


def _attempt(attempt: dict[str, Any]) -> tuple[str, ...]:
    end = attempt["end"]
    ended = f"{end['class']}, {clock(end['time'])}" if end else "-"
    step = "-" if attempt["last_step"] is None else str(attempt["last_step"])
    names = (str(attempt[key] or "-") for key in ("target", "job_id", "reason"))
    return (str(attempt["number"]), clock(attempt["time"]), *names, step, ended)


def _failure(failure: dict[str, Any]) -> Iterator[str]:
    who = "the launcher" if failure["rank"] is None else f"rank {failure['rank']}"
    where = f" on {failure['node']}" if failure["node"] else ""
    yield f"first failure: {who}{where}: {failure['class']}: {failure['message']}"
    if failure["traceback"]:
        yield failure["traceback"].rstrip()
