"""`launcher status`: how one run stands, its attempts, and what went wrong where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from launcher.cli._common import clock, columns, find_submitted, job_line, progress


@click.command("status")
@click.argument("run")
@click.option("--history", is_flag=True, help="One line an attempt: why it started, what it did, how it ended.")
@click.option("--json", "as_json", is_flag=True, help="Print the shape of docs/json.md.")
def command(run: str, history: bool, as_json: bool) -> None:
    """Say how a run stands: its job, state, step, attempts, the first failing rank; changes nothing.

    RUN is a path, or a name below runs/. The target of its last job is asked.

    \b
    example: launcher status runs/quickstart
    example: launcher status runs/quickstart --history
    """
    from launcher.jobs.asking import summaries

    (summary,) = summaries([find_submitted(run)])
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo("\n".join(_history(summary) if history else _lines(summary)))


def _history(summary: dict[str, Any]) -> Iterator[str]:
    if not summary["attempts"]:
        yield f"{summary['run']}: no attempt yet; {_job(summary) or 'nothing was submitted'}"
        return
    heading = (
        "attempt", "started", "reason", "job", "restart", "nodes", "steps", "lasted", "ended", "verdict", "why",
    )  # fmt: skip
    rows = [_past(attempt, attempt is summary["attempts"][-1]) for attempt in summary["attempts"]]
    yield columns([heading, *rows])
    for attempt in summary["attempts"]:
        if attempt["end"] and (first := attempt["end"]["first"]):
            yield f"attempt {attempt['number']}: {_who(first)}: {_what(first)}"
    if left := _left_alone(summary):
        yield left


def _past(attempt: dict[str, Any], latest: bool) -> tuple[str, ...]:
    end = attempt["end"] or {}
    job = " ".join(str(attempt[key]) for key in ("target", "job_id") if attempt[key])
    last = "?" if attempt["last_step"] is None else attempt["last_step"]
    ended = end.get("class") or ("-" if latest else "no word")
    return (
        str(attempt["number"]), clock(attempt["time"]), attempt["reason"] or "-", job or "-",
        _or_dash(attempt["restart"]), _nodes(attempt["nodes"]), f"{attempt['first_step']} -> {last}",
        _lasted(attempt["time"], end.get("time")), ended, end.get("verdict") or "-", end.get("why") or "-",
    )  # fmt: skip


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _nodes(nodes: Any) -> str:
    """Their names, or how many where they are many."""
    if not isinstance(nodes, list):
        return _or_dash(nodes)
    return ",".join(nodes) if len(nodes) <= 2 else f"{nodes[0]} and {len(nodes) - 1} more"


def _lasted(start: float | None, end: float | None) -> str:
    if start is None or end is None:
        return "-"
    seconds = max(0, round(end - start))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _job(summary: dict[str, Any]) -> str:
    return job_line(summary["job"], always_reason=True) if summary["job"] else ""


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    at = "" if summary["loss_step"] == summary["step"] else f" at step {summary['loss_step']}"
    loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}{at}"
    step = f"step {progress(summary['step'], summary['total_steps'])}{loss}"
    yield f"run         {summary['run']} ({summary['path']})"
    yield f"state       {summary['status']}, {step}; {clock(summary['updated'])}"
    if remark := _remark(summary):
        yield f"            {remark}"
    if evaluation := summary["evaluation"]:
        yield f"evaluation  {_evaluation(evaluation)}"
    if guards := _guards(summary["guards"]):
        yield f"guards      {guards}"
    for slow in summary["slow"]:
        yield f"slow        {_slow(slow)}"
    if job := _job(summary):
        yield f"job         {job}, submitted {clock(summary['job']['time'])}"
    if summary["stop_requested"] is not None:
        yield f"stop asked  {summary['stop_requested'] or 'no reason given'}"
    checkpoint = summary["last_checkpoint"]
    yield f"checkpoint  {Path(checkpoint['path']).name if checkpoint else 'none yet'}"
    if every := summary["save_every"]:
        steps = f", about {every['steps']} steps" if every["steps"] else ""
        yield f"            every {every['seconds']:.3g} s{steps}: {every['reason']}"
    if rehearsed := summary["rehearsal"]:
        yield f"            {_rehearsal(rehearsed)}"
    if summary["attempts"]:
        yield ""
        heading = ("attempt", "started", "target", "job", "reason", "step", "ended")
        yield columns([heading, *(_attempt(attempt) for attempt in summary["attempts"])])
    for attempt in summary["attempts"]:
        if attempt["end"] and attempt["end"]["again"] and (first := attempt["end"]["first"]):
            yield f"attempt {attempt['number']} went on by itself after {_who(first)}: {_what(first)}"
    if failure := summary["failure"]:
        yield ""
        yield from _failure(failure)


def _evaluation(evaluation: dict[str, Any]) -> str:
    """`loss 3.2100 (chat 2.9000, web 3.4000) at step 100`; one set needs no name."""
    sets = evaluation["sets"]
    apart = f" ({', '.join(f'{name} {_loss(loss)}' for name, loss in sets.items())})" if len(sets) > 1 else ""
    return f"loss {_loss(evaluation['loss'])}{apart} at step {evaluation['step']}"


def _rehearsal(found: dict[str, Any]) -> str:
    from launcher.plan.disk import size_text

    load = f"loaded in {found['load_s']:.2g} s"
    return f"rehearsed: {size_text(found['bytes'])}, durable after {found['durable_s']:.2g} s, {load}"


def _guards(counts: dict[str, int]) -> str:
    """`2 steps skipped, 1 left out, 3 spikes`; empty where nothing was wrong."""
    said = [f"{counts['skipped']} step{'s' * (counts['skipped'] != 1)} skipped"] if counts["skipped"] else []
    if total := counts["left_out"]:
        said.append(f"{total} global batch{'es' * (total != 1)} left out (left-out.jsonl)")
    if counts["spikes"]:
        said.append(f"{counts['spikes']} spike{'s' * (counts['spikes'] != 1)} of the loss")
    return ", ".join(said)


def _slow(slow: dict[str, Any]) -> str:
    """`rank 1 on node-b, computing 2.1 times as long as the median, told at step 120`"""
    data = "waiting for its rows: steps are {:.1f} times as long for it"
    what = data if slow["what"] == "data" else "computing {:.1f} times as long as the median"
    return f"rank {slow['rank']} on {slow['node']}, {what.format(slow['factor'])}, told at step {slow['step']}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _remark(summary: dict[str, Any]) -> str:
    from launcher.jobs.job import ACTIVE

    owner, job = summary["owner"], (summary["job"] or {}).get("state")
    if summary["status"] == "interrupted" and job in ACTIVE:
        left = "still runs" if job == "running" else "is still to run"
        return f"its last start is gone without a last word; its job {left}"
    if summary["status"] == "interrupted":
        return f"its launcher is gone without a last word; `launcher resume {summary['path']}` goes on"
    if summary["status"] == "unknown":
        return f"its launcher, pid {owner['pid']}, cannot be seen from here; ask on {owner['host']}"
    if owner and owner["alive"]:
        return f"on {owner['host']}, pid {owner['pid']}"
    return _left_alone(summary)


def _left_alone(summary: dict[str, Any]) -> str:
    """Said of a run that could go on, but whose job is over, as after `scancel`, and whatever its verdict was."""
    from launcher.jobs.job import OVER

    job = summary["job"]
    if summary["status"] != "preempted" or job is None or job["state"] not in OVER or summary["verdict"] == "stop":
        return ""
    gone = f"its {job['target']} job {job['id']} is over ({job['state']})"
    return f"{gone}: nothing starts it again; `launcher submit {summary['path']}` goes on"


def _attempt(attempt: dict[str, Any]) -> tuple[str, ...]:
    end = attempt["end"]
    ended = f"{end['class']}, {clock(end['time'])}" if end else "-"
    step = "-" if attempt["last_step"] is None else str(attempt["last_step"])
    names = (str(attempt[key] or "-") for key in ("target", "job_id", "reason"))
    return (str(attempt["number"]), clock(attempt["time"]), *names, step, ended)


def _failure(failure: dict[str, Any]) -> Iterator[str]:
    from launcher.jobs.cures import cure

    when = "" if failure["time"] is None else f"; {clock(failure['time'])}"
    yield f"first failure: {_who(failure)}: {_what(failure)}{when}"
    if failure["traceback"]:
        yield failure["traceback"].rstrip()
    if advice := cure(failure["message"], failure["traceback"] or ""):
        yield f"what to do: {advice}"


def _who(failure: dict[str, Any]) -> str:
    """`rank 1 on gpu007 at step 40`"""
    who = "the launcher" if failure["rank"] is None else f"rank {failure['rank']}"
    where = f" on {failure['node']}" if failure["node"] else ""
    step = "" if failure["step"] is None else f" at step {failure['step']}"
    return f"{who}{where}{step}"


def _what(failure: dict[str, Any]) -> str:
    return f"{failure['class']}: {failure['message']}"
