"""One node's part of a job: node 0 leads the attempt, the others learn of it from node 0's store and follow."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from launcher.errors import EXIT_FINISHED, UserError
from launcher.jobs import shared
from launcher.jobs.agent import Node
from launcher.jobs.console import Console
from launcher.jobs.ending import Ending
from launcher.jobs.opening import open_run, owned, stored_recipe
from launcher.jobs.rendezvous import address, require_free_port
from launcher.jobs.restart import refusal
from launcher.jobs.signals import Signals
from launcher.jobs.supervisor import begin, conclude, is_finished, prepared, ready_machine, supervise, tell
from launcher.plan import make_plan
from launcher.run.directory import RunDirectory

JOIN_TIMEOUT_S = 3600  # for node 0 to prepare the data, and for every node to come
_KEY = "launcher/attempt"
_SEEN = "launcher/seen/"  # + node rank: empty, or why that node cannot take part


def work(run: RunDirectory, *, nodes: int | None, node_rank: int, rendezvous: str | None, console: Console) -> int:
    """Do this node's part; the exit code of `launcher worker`.

    Raises:
        UserError: impossible options, a taken port, or what the recipe asks for and this node lacks.
    """
    started = time.monotonic()
    overrides = [] if nodes is None else [f"cluster.nodes={nodes}"]
    recipe = stored_recipe(run, overrides)
    node = _node(recipe.cluster.nodes, node_rank, rendezvous)
    plan = make_plan(recipe)
    if is_finished(run, recipe, console.say):
        return EXIT_FINISHED
    with Signals() as signals:
        machine = ready_machine(recipe, console.say)
        if node.rank > 0:
            attempt, ending = _follow(run, node, signals)
            if ending is None:
                ending = supervise(run, recipe, plan, attempt, node, machine, console, signals, started=started)
        else:
            with owned(run):
                open_run(run, recipe, plan, force=False, say=console.say)
                store = _host(node)
                attempt = begin(run, recipe, plan, reason="worker")
                ending = refusal(run, attempt) or prepared(run, recipe, console, signals)
                if store is not None:
                    store.set(
                        _KEY, json.dumps([attempt, shared.leave_token(run), ending and dataclasses.asdict(ending)])
                    )
                    ending = ending or _missing(store, node, signals)
                if ending is None:
                    ending = supervise(run, recipe, plan, attempt, node, machine, console, signals, started=started)
                ending = conclude(run, attempt, ending)
    tell(run, attempt, ending, console)
    return ending.worker_exit_code


def _node(nodes: int, rank: int, rendezvous: str | None) -> Node:
    if not 0 <= rank < nodes:
        raise UserError(f"--node-rank {rank}: expected 0 to {nodes - 1}, for {nodes} nodes (--nodes).")
    if nodes == 1:
        return Node()
    host, _ = address(rendezvous, name="--rendezvous")
    return Node(
        nodes=nodes,
        rank=rank,
        rendezvous=rendezvous,
        local_address=_address_towards(host),
        join_timeout_s=JOIN_TIMEOUT_S,
    )


def _address_towards(host: str) -> str:
    """This machine's address on the interface that leads to `host`; no packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--rendezvous {host}: this machine cannot reach it ({error.strerror or error}).") from None


def _host(node: Node) -> Any:
    """The store that all nodes of this attempt share; None when this node is alone."""
    if node.rendezvous is None:
        return None
    host, port = address(node.rendezvous, name="--rendezvous")
    require_free_port(port, name=f"--rendezvous {node.rendezvous}")
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=True, wait_for_workers=False)


def _missing(store: Any, node: Node, signals: Signals) -> Ending | None:
    """Wait until each other node has said that it sees this run directory; the ending where one does not."""
    deadline = time.monotonic() + node.join_timeout_s
    for rank in range(1, node.nodes):
        while not store.check([f"{_SEEN}{rank}"]):
            if signals.stop is not None:
                message = f"{signals.stop} while waiting for node {rank}"
                return Ending(status="preempted", failure_class="preemption", message=message)
            if time.monotonic() >= deadline:
                message = f"node {rank} did not come within {node.join_timeout_s} s"
                return Ending(status="failed", failure_class="node", message=message)
            time.sleep(0.05)
        if problem := store.get(f"{_SEEN}{rank}").decode():
            return Ending(status="failed", failure_class="user", message=problem)
    return None


def _follow(run: RunDirectory, node: Node, signals: Signals) -> tuple[int, Ending | None]:
    """The attempt that node 0 began, and how it ended if no rank is to start; waits for node 0."""
    assert node.rendezvous is not None
    host, _, port = node.rendezvous.rpartition(":")
    answers: list[tuple[int, Ending | None]] = []

    def ask() -> None:
        from torch.distributed import TCPStore

        try:
            wait = timedelta(seconds=node.join_timeout_s)
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=wait)
            attempt, token, ending = json.loads(store.get(_KEY))
            problem = "" if ending else shared.problem(run, token)
            store.set(f"{_SEEN}{node.rank}", problem)
            refusal = Ending(status="failed", failure_class="user", message=problem) if problem else None
            answers.append((attempt, Ending(**ending) if ending else refusal))
        except Exception as error:
            message = f"node 0 did not answer at {node.rendezvous}: {error}"
            answers.append((0, Ending(status="failed", failure_class="communication", message=message)))

    threading.Thread(target=ask, name="follow", daemon=True).start()
    while not answers:
        if signals.stop is not None:
            message = f"{signals.stop} while waiting for node 0"
            return 0, Ending(status="preempted", failure_class="preemption", message=message)
        time.sleep(0.05)
    return answers[0]
