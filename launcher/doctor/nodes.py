"""The machines of a job side by side: facts of each, what differs, and what their ranks measure together."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import doctor
from launcher.errors import UserError
from launcher.jobs import meeting
from launcher.jobs.agent import Node
from launcher.jobs.checks import Needs, by_node, judge, labels, worst_first
from launcher.jobs.cures import cure
from launcher.jobs.devices import threads_per_rank
from launcher.jobs.environment import require_train_extra
from launcher.jobs.facts import Facts, facts
from launcher.jobs.finding import Finding
from launcher.jobs.meeting import Away, Meeting, Stopped
from launcher.jobs.place import Place, find_place
from launcher.jobs.preflight import clock_of_node_0
from launcher.jobs.rendezvous import address
from launcher.jobs.signals import Signals
from launcher.jobs.worker import find_node
from launcher.plan import make_plan
from launcher.recipe.schema import Cluster, Recipe
from launcher.run.directory import RunDirectory

Say = Callable[[str], None]

JOIN_TIMEOUT_S = 300  # without a recipe that says how long
_RANKS_TIMEOUT_S = 240.0
_FILE_SEEN_WITHIN_S = 10.0  # a network file system may show a new file late
_RANKS_ON_A_CPU = 2  # of a node without GPUs, where no recipe says how many
_LINES = 12  # of what a failed rank said


@dataclass(frozen=True, slots=True)
class Examined:
    """What came out, in the order of the nodes.

    ranks: what `launcher.trainer.preflight` reports, None where ranks did not get so far
    """

    nodes: Sequence[Facts]
    findings: Sequence[Finding]
    ranks: Mapping[str, Any] | None

    @property
    def ok(self) -> bool:
        return all(finding.state != "bad" for finding in self.findings)


def where(nodes: str, node_rank: int | None, rendezvous: str | None) -> Place:
    """This machine's place among those that are examined: by options, else as the scheduler says.

    nodes: of --nodes: how many, or `auto`

    Raises:
        UserError: what `find_place` says; --nodes is neither.
    """
    given = os.environ.get("LAUNCHER_NODES") if nodes == "auto" else nodes
    if given is not None and not given.isdecimal():
        raise UserError(f"--nodes {given}: expected a number of machines, or --nodes alone under a scheduler.")
    return find_place(nodes=int(given) if given else None, node_rank=node_rank, rendezvous=rendezvous)


def examine_nodes(place: Place, recipe: Recipe | None, *, folder: Path, say: Say) -> tuple[bool, Examined | None]:
    """Examine all nodes together; each calls this. Whether nothing is bad, and on node 0 all that was seen.

    Args:
        place: without a number of nodes, the recipe's count; without both, this machine is alone
        recipe: what the job is; None: ranks for the GPUs of the node that has the fewest
        folder: whose file system is looked at
    Raises:
        UserError: a place that cannot be, or a node that was told another one. Nodes that do not come are said.
    """
    require_train_extra()
    placed = Recipe(cluster=Cluster(nodes=place.nodes or 1, join_timeout_s=JOIN_TIMEOUT_S))
    node = find_node(recipe or placed, place, say)
    if node.rendezvous is None:
        seen = _all_of(None, node, recipe, folder, say)
        assert seen is not None
        return seen.ok, seen
    with Signals() as signals:
        try:
            others = meeting.host(node, signals) if node.rank == 0 else meeting.join(node, signals, say)
            try:
                _gather_round(others, say)
                seen = _all_of(others, node, recipe, folder, say)
                ok = bool(others.broadcast("doctor/ok", seen.ok if seen else None))
                others.exchange("doctor/bye", True)  # node 0's store lives until everybody has heard
            finally:
                others.leave()
        except (Away, Stopped) as error:
            say(str(error))
            return False, None
    return ok, seen


def _gather_round(others: Meeting, say: Say) -> None:
    """Everybody is there.

    Raises:
        UserError: somebody cannot take part; Away: somebody does not come.
    """
    if others.node.rank > 0:
        others.come()
    elif (ending := others.await_all(say)) is not None:
        raise UserError(ending.message) if ending.failure_class == "user" else Away(ending.message)


def _all_of(others: Meeting | None, node: Node, recipe: Recipe | None, folder: Path, say: Say) -> Examined | None:
    """The examination itself; None on all nodes but the first."""
    plan = make_plan(recipe) if recipe else None
    run = RunDirectory(folder) if recipe else None
    mine = facts(recipe, folder, address=node.local_address if others else None)
    with clock_of_node_0(others) if others else contextlib.nullcontext() as clock:
        mine["clock"] = clock
        mine["findings"] = [asdict(finding) for finding in doctor.examine() if finding.state != "ok"]
        nodes = _exchanged(others, "doctor/facts", mine)
    shared = _shared(others, folder)
    findings: list[Finding] = []
    if nodes is not None:
        needs = Needs.of(recipe, plan, run) if recipe and plan else None
        own = [[Finding(**values) for values in each.pop("findings")] for each in nodes]
        findings = [*judge(nodes, needs), *shared, *by_node(dict(zip(labels(nodes), own, strict=True)))]
    ranks, said = _measured(others, node, recipe, nodes, findings, say)
    return None if nodes is None else Examined(nodes, worst_first([*findings, *said]), ranks)


def _exchanged(others: Meeting | None, name: str, payload: Any) -> list[Any] | None:
    return [payload] if others is None else others.exchange(name, payload)


def _shared(others: Meeting | None, folder: Path) -> list[Finding]:
    """Whether all nodes see one folder: node 0 leaves a file there, which goes again."""
    if others is None:
        return []
    while not folder.exists():
        folder = folder.parent
    file = folder / f".launcher-doctor-{uuid.uuid4().hex}"
    rank = others.node.rank
    try:
        if rank == 0:
            with contextlib.suppress(OSError):
                file.touch()
        name = others.broadcast("doctor/file", str(file) if file.exists() else None)
        seen = others.exchange("doctor/seen", name is not None and _comes(Path(name)))
    finally:
        if rank == 0:
            file.unlink(missing_ok=True)
    if seen is None:
        return []
    if name is None:
        text = f"{folder}: cannot be written on node 0, so it is not known whether all nodes see one folder"
        return [Finding("nodes", "shared folder", "note", text, "Run this in the folder of the runs.")]
    blind = [f"{others.names[i]} (node {i})" for i, sees in enumerate(seen) if not sees]
    if blind:
        text = f"{folder}: {', '.join(blind)} and node 0 do not see the same folder"
        return [Finding("nodes", "shared folder", "bad", text, "Put run.dir on a file system that all nodes share.")]
    return [Finding("nodes", "shared folder", "ok", f"{folder} is one on all nodes")]


def _comes(file: Path) -> bool:
    deadline = time.monotonic() + _FILE_SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _measured(
    others: Meeting | None,
    node: Node,
    recipe: Recipe | None,
    nodes: Sequence[Facts] | None,
    findings: Sequence[Finding],
    say: Say,
) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    """What ranks of all nodes measure together, as `launcher.trainer.preflight` reports it, and what that comes to."""
    order = _order(node, recipe, nodes, findings) if nodes is not None else None
    order = others.broadcast("doctor/order", order) if others else order
    assert order is not None
    if order["why_not"]:
        return None, [] if nodes is None else [Finding("ranks", "all-reduce", "note", *order["why_not"])]
    if node.rank == 0:
        count = node.nodes * order["ranks"]
        say(f"{count} rank{'s' * (count > 1)} on {order['accelerator']} measure together ...")
    ended = _exchanged(others, "doctor/ranks", _run_ranks(node, order))
    return (None, []) if ended is None or nodes is None else _told(ended, labels(nodes))


def _order(node: Node, recipe: Recipe | None, nodes: Sequence[Facts], findings: Sequence[Finding]) -> dict[str, Any]:
    """On node 0: how many ranks each node starts, on what, and where they meet."""
    differing = [finding for finding in findings if finding.state == "bad" and finding.name in ("versions", "ports")]
    gpus = min(each["gpus"]["count"] for each in nodes)
    ranks = recipe.cluster.nproc_per_node if recipe else gpus or _RANKS_ON_A_CPU
    on_cpu = gpus < ranks or (recipe is not None and recipe.cluster.accelerator == "cpu")
    host = address(node.rendezvous, name="--rendezvous")[0] if node.rendezvous else "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    why_not = ("not tried, because nodes do not fit each other", "Mend that first.") if differing else None
    accelerator = "cpu" if on_cpu else "cuda"
    return {"ranks": ranks, "accelerator": accelerator, "host": host, "port": port, "why_not": why_not}


def _run_ranks(node: Node, order: Mapping[str, Any]) -> dict[str, Any]:
    """Start this node's ranks and wait; what rank 0 printed, and how the first that failed ended."""
    command = [sys.executable, "-m", "launcher.doctor.rank", str(os.getpid())]
    count = int(order["ranks"])
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2 * count)]
        processes = []
        for i in range(count):
            environment = {**os.environ, **node.environment, **_variables(node, order, i)}
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=outputs[2 * i],
                    stderr=outputs[2 * i + 1],
                )
            )
        failed, late = _wait(processes)
        for output in outputs:
            output.seek(0)
        texts = [output.read().decode(errors="replace") for output in outputs]
    said = "" if failed is None else _last_lines(texts[2 * failed + 1])
    why = f"nothing came within {_RANKS_TIMEOUT_S:.0f} s. {said}" if late else said
    return {"report": texts[0] if failed is None else "", "failed": failed is not None, "why": why.strip()}


def _variables(node: Node, order: Mapping[str, Any], local_rank: int) -> dict[str, str]:
    ranks = int(order["ranks"])
    values = {
        "RANK": node.rank * ranks + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": node.nodes * ranks,
        "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": node.rank, "MASTER_ADDR": order["host"], "MASTER_PORT": order["port"],
        "LAUNCHER_ACCELERATOR": order["accelerator"], "LAUNCHER_NODE": socket.gethostname(),
        "OMP_NUM_THREADS": threads_per_rank(ranks),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int | None, bool]:
    """Wait for all, at most so long; one that fails ends the others. Which failed, and whether it took too long."""
    deadline = time.monotonic() + _RANKS_TIMEOUT_S
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() >= deadline:
                return codes.index(None), True
            time.sleep(0.05)
        return next((i for i, code in enumerate(codes) if code), None), False
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _last_lines(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-_LINES:])


def _told(ended: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Mapping[str, Any] | None, list[Finding]]:
    """The report of rank 0 and what it comes to; or why there is none."""
    failed = [(name, each["why"]) for name, each in zip(names, ended, strict=True) if each["failed"]]
    if failed or not ended[0]["report"]:
        name, why = next(((name, why) for name, why in failed if cure(why)), (failed or [(names[0], "")])[0])
        last = (why.splitlines() or ["it said nothing"])[-1]
        advice = cure(why) or "Look at the rest with NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment."
        text = f"ranks on {name} failed: {last}"
        return None, [Finding("ranks", "all-reduce", "bad", text.rstrip("."), advice)]
    report = json.loads(ended[0]["report"])
    return report, list(_findings(report))


def _findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    if report["all_reduce_s"] is not None:
        text = f"{report['all_reduce_bytes'] >> 20} MiB on {len(report['nodes'])} ranks in "
        text += f"{report['all_reduce_s'] * 1e3:.1f} ms, {report['bus_gb_per_s']:.3g} GB/s on each link"
        yield Finding("ranks", "all-reduce", "ok", text)
    speeds = report["matmul_tflops"]
    for rank in report["slow"]:
        fix = "See nvidia-smi -q -d PERFORMANCE there, or leave the node out."
        text = f"rank {rank} on {report['nodes'][rank]} does {speeds[rank]:.3g} TFLOP/s, less than 0.8 of the median"
        yield Finding("ranks", "matmul", "note", text, fix)
    if speeds and not report["slow"]:
        text = f"{min(speeds):.3g} to {max(speeds):.3g} TFLOP/s, no rank below 0.8 of the median"
        yield Finding("ranks", "matmul", "ok", text)
