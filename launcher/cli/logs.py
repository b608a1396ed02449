"""`launcher logs`: what one rank of one attempt printed, whole, its end, or as it comes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import click

from launcher.cli._common import find_run, find_submitted
from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts

_POLL_S = 0.2
_BLOCK = 1 << 16


@click.command("logs")
@click.argument("run")
@click.option("--rank", default=0, show_default=True, help="Counted over all nodes.")
@click.option("--attempt", type=click.IntRange(min=1), help="Default: the latest.")
@click.option("--node", help="Needed only where several nodes kept a log of this rank.")
@click.option("--follow", is_flag=True, help="Go on with what is written, until the attempt ends.")
@click.option("--lines", type=click.IntRange(min=0), help="Only the last so many.  Default: all.")
@click.option("--job", is_flag=True, help="What the last submitted job printed itself, in place of a rank's log.")
def command(
    run: str, rank: int, attempt: int | None, node: str | None, follow: bool, lines: int | None, job: bool
) -> None:
    """Print what a rank printed, or the job that started the ranks; changes nothing.

    \b
    example: launcher logs quickstart --rank 1 --lines 50
    example: launcher logs quickstart --job
    """
    from launcher.run.lease import current_owner

    if job:
        if rank or attempt is not None or node is not None or follow:
            raise UserError(
                "--job prints a job's own output: --rank, --attempt, --node and --follow are for ranks' logs."
            )
        _print_job(run, lines)
        return
    directory = find_run(run)
    known = attempts(directory)
    if not known:
        raise UserError(f"{directory.path}: no attempt has started yet, so there are no logs.")
    number = attempt or known[-1].number
    if number not in [a.number for a in known]:
        raise UserError(f"--attempt {number}: expected 1 to {known[-1].number}, the attempts of {directory.path}.")

    def over() -> bool:
        latest = attempts(directory)[-1]
        return latest.number > number or latest.ended or current_owner(directory)[1] is False

    try:
        path = _wait_for_log(directory, number, rank, node, over if follow else None)
        with open(path, "rb") as log:
            _seek_last_lines(log, lines)
            _pass_on(log)
            while follow:
                last = over()  # asked first: what was written before the end is still passed on
                _pass_on(log)
                if last:
                    return
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        return


def _print_job(text: str, lines: int | None) -> None:
    from collections import deque

    from launcher.jobs import targets
    from launcher.jobs.submissions import latest

    run, place = find_submitted(text)
    if (job := latest(place)) is None:
        raise UserError(
            f"{run.path}: nothing was submitted, so there is no job's output. Its ranks' logs: launcher logs"
        )
    printed = targets.find(job.target).logs(job)
    for line in printed if lines is None else deque(printed, maxlen=lines):
        click.echo(line)


def _wait_for_log(
    run: RunDirectory, attempt: int, rank: int, node: str | None, over: Callable[[], bool] | None
) -> Path:
    """The log; where it is followed, an attempt that has just begun is given the time to make it."""
    while True:
        last = over is None or over()
        if (path := _find_log(run, attempt, rank, node, complain=last)) is not None:
            return path
        time.sleep(_POLL_S)


def _find_log(run: RunDirectory, attempt: int, rank: int, node: str | None, *, complain: bool) -> Path | None:
    folder = run.path / "logs" / f"attempt-{attempt}"
    found = [path for path in sorted(folder.glob(f"*/{rank}.log")) if node in (None, path.parent.name)]
    if len(found) == 1:
        return found[0]
    if found:
        nodes = ", ".join(path.parent.name for path in found)
        raise UserError(f"rank {rank} of attempt {attempt} has a log on several nodes: {nodes}. Choose by --node.")
    if not complain:
        return None
    there = ", ".join(f"{path.parent.name}/{path.stem}" for path in sorted(folder.glob("*/*.log"))) or "none"
    on = f" on node {node}" if node else ""
    raise UserError(f"{run.path}: no log of rank {rank}{on} in attempt {attempt}. Logs there (node/rank): {there}.")


def _seek_last_lines(log: BinaryIO, lines: int | None) -> None:
    """Place the file before its last `lines` lines; reads backwards, so a long log costs nothing."""
    if lines is None:
        return
    at = end = log.seek(0, os.SEEK_END)
    breaks = -1  # the one that ends the last line is none between lines
    if end and lines:
        log.seek(end - 1)
        breaks = -1 if log.read(1) == b"\n" else 0
    while at and lines:
        at, upper = max(0, at - _BLOCK), at
        log.seek(at)
        block = log.read(upper - at)
        breaks += block.count(b"\n")
        if breaks >= lines:
            for _ in range(breaks - lines):
                block = block[block.index(b"\n") + 1 :]
            log.seek(upper - len(block) + block.index(b"\n") + 1)
            return
    log.seek(end if not lines else 0)


def _pass_on(log: BinaryIO) -> None:
    """Copy what is left to standard output."""
    while block := log.read(_BLOCK):
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
