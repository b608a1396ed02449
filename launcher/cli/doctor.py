"""`launcher doctor`: says what this machine has for training and what to do about the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from launcher.errors import EXIT_FAILED, EXIT_FINISHED

if TYPE_CHECKING:
    from launcher.doctor import Finding

VERSION = 1


@click.command(short_help="Say what this machine has for training, and what to do about the rest.")
@click.option("--build-ops", is_flag=True, help="Build DeepSpeed's operators for this machine, then look.")
@click.option("--json", "as_json", is_flag=True, help="Print one object (docs/json.md).")
def command(build_ops: bool, as_json: bool) -> int:
    """Say which packages, GPUs, compilers and DeepSpeed operators this machine has; change nothing.

    With --build-ops, compile DeepSpeed's Adam (and async_io where libaio is, the quantizer where a GPU is) ahead of
    the first run, for the processor of this machine. Ends with 1 when something keeps training from starting, or the
    Adam cannot be built; a note is for what only some recipes need.

    example: launcher doctor --build-ops
    """
    from launcher.doctor import build_operators, examine

    built = list(build_operators(lambda line: click.echo(line, err=True))) if build_ops else []
    findings = [*(f for f in examine() if not (build_ops and f.group == "operators")), *built]
    ok = all(finding.state != "bad" for finding in findings)
    if as_json:
        click.echo(json.dumps({"version": VERSION, "ok": ok, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        click.echo(_table(findings))
    return EXIT_FINISHED if ok else EXIT_FAILED


def _table(findings: Sequence[Finding]) -> str:
    """A line a finding, under its group."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for i, finding in enumerate(findings):
        if i == 0 or finding.group != findings[i - 1].group:
            lines.append(finding.group)
        text = f"{finding.text}. {finding.fix}" if finding.fix else finding.text
        lines.append(f"  {finding.state:<4}  {finding.name:<{width}}  {text}")
    return "\n".join(lines)
