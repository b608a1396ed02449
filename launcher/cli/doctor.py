"""`launcher doctor`: says what this machine, or each of several, has for training and what to do about the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli._common import columns
from launcher.errors import EXIT_FAILED, EXIT_FINISHED

if TYPE_CHECKING:
    from launcher.doctor.nodes import Examined
    from launcher.jobs.finding import Finding
    from launcher.jobs.place import Place
    from launcher.recipe.schema import Recipe

VERSION = 1


@click.command(short_help="Say what this machine has for training, and what to do about the rest.")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--build-ops", is_flag=True, help="Build DeepSpeed's operators for this machine, then look.")
@click.option(
    "--nodes",
    is_flag=False,
    flag_value="auto",
    metavar="[N]",
    help="Examine N machines side by side; without N, those of the scheduler's job.",
)
@click.option("--node-rank", type=int, envvar="LAUNCHER_NODE_RANK", help="This machine's number, from 0.")
@click.option("--rendezvous", envvar="LAUNCHER_RENDEZVOUS", help="HOST:PORT on node 0.  [default: the scheduler's]")
@click.option("--json", "as_json", is_flag=True, help="Print one object (docs/json.md).")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    build_ops: bool,
    nodes: str | None,
    node_rank: int | None,
    rendezvous: str | None,
    as_json: bool,
) -> int:
    """Say which packages, GPUs, compilers and DeepSpeed operators this machine has; change nothing.

    With RECIPE, also what that run needs: space for its checkpoints, memory to page-lock, compilers. With --nodes,
    started on each machine, node 0 prints all side by side, what differs, and what their ranks measure together.
    With --build-ops, compile DeepSpeed's Adam (and async_io where libaio is, the quantizer where a GPU is) ahead of
    the first run, for the processor of this machine. Ends with 1 when something keeps training from starting, or the
    Adam cannot be built; a note is for what only some recipes need.

    \b
    example: launcher doctor --build-ops
    example: srun --ntasks-per-node=1 launcher doctor --nodes
    """
    if nodes is not None:
        from launcher.doctor.nodes import where

        place = where(nodes, node_rank, rendezvous)
        counted = [] if place.nodes is None else [f"cluster.nodes={place.nodes}"]
        return _side_by_side(place, *_wanted(recipe, [*overrides, *counted]), as_json=as_json)
    from launcher.doctor import build_operators, examine
    from launcher.doctor.here import node

    wanted, folder = _wanted(recipe, overrides)
    built = list(build_operators(lambda line: click.echo(line, err=True))) if build_ops else []
    looked = [*examine(), *node(wanted, folder)]
    findings = [*(f for f in looked if not (build_ops and f.group == "operators")), *built]
    ok = all(finding.state != "bad" for finding in findings)
    if as_json:
        _print_json(ok, findings)
    else:
        click.echo(_table(findings))
    return EXIT_FINISHED if ok else EXIT_FAILED


def _wanted(recipe: str | None, overrides: Sequence[str]) -> tuple[Recipe | None, Path]:
    """The recipe that is asked about, and the folder of its run, or this one."""
    if recipe is None:
        return None, Path.cwd()
    from launcher.jobs.opening import run_directory
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    return loaded, run_directory(loaded).path


def _side_by_side(place: Place, recipe: Recipe | None, folder: Path, *, as_json: bool) -> int:
    from launcher.doctor.nodes import examine_nodes

    ok, seen = examine_nodes(place, recipe, folder=folder, say=lambda line: click.echo(line, err=True))
    if seen is not None and as_json:
        _print_json(ok, seen.findings, nodes=list(seen.nodes), ranks=seen.ranks)
    elif seen is not None:
        click.echo(_nodes(seen))
        click.echo(_table(seen.findings))
    return EXIT_FINISHED if ok else EXIT_FAILED


def _print_json(ok: bool, findings: Sequence[Finding], **more: Any) -> None:
    values = {"version": VERSION, "ok": ok, "findings": [asdict(finding) for finding in findings], **more}
    click.echo(json.dumps(values, indent=2))


def _table(findings: Sequence[Finding]) -> str:
    """A line a finding, under its group."""
    groups = list(dict.fromkeys(finding.group for finding in findings))
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for group in groups:
        lines.append(group)
        lines += [f"  {f.state:<4}  {f.name:<{width}}  {f}" for f in findings if f.group == group]
    return "\n".join(lines)


def _nodes(seen: Examined) -> str:
    """A line a node."""
    heading = ("node", "host", "torch", "CUDA", "NCCL", "driver", "GPUs", "network", "InfiniBand", "free disk", "clock")
    return columns([heading, *(_node(number, facts) for number, facts in enumerate(seen.nodes))])


def _node(number: int, facts: dict[str, Any]) -> tuple[str, ...]:
    from launcher.jobs.checks import size

    versions, gpus, network, clock = facts["versions"], facts["gpus"], facts["network"] or {}, facts["clock"] or {}
    models = ", ".join(dict.fromkeys(gpus["models"]))
    active = sum(port["state"] == "ACTIVE" for port in facts["hcas"])
    offset = clock.get("offset_s")
    return (
        str(number), facts["host"], *(versions.get(name) or "-" for name in ("torch", "cuda", "nccl", "driver")),
        f"{gpus['count']} x {models}" if models else str(gpus["count"]),
        " ".join(filter(None, (network.get("interface"), network.get("address")))) or "-",
        f"{active} active" if active else "-", f"{size(facts['disk']['free'])} {facts['disk']['type']}",
        "-" if offset is None else f"{offset:+.3f} s",
    )  # fmt: skip
