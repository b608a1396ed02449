"""torch's own elastic agent for one attempt on one node: rendezvous, ranks from the fork server, and their end.

It runs in a thread, so it installs no signal handlers: what a signal means is decided by `launcher.jobs.signals`.
Restarts in place stay off: they may wait 30 s for the other ranks; a new attempt costs a third of a second.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

from launcher.jobs import rank, scratch, warm
from launcher.jobs.ending import Ending
from launcher.jobs.silent import MemoryKills
from launcher.jobs.starting import Starting
from launcher.run.output import PatientStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """This node's place in the job.

    rendezvous: HOST:PORT of a store that all nodes reach, made before; None: this node is alone, any free port
    local_address: by which the other nodes reach this one
    join_timeout_s: how long nodes wait for each other
    names_may_come: whether node 0's name may not be known to the name service yet
    environment: variables for the ranks, which name the network interface
    """

    nodes: int = 1
    rank: int = 0
    rendezvous: str | None = None
    local_address: str = "127.0.0.1"
    join_timeout_s: int = 600
    names_may_come: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Agent:
    """Starts at once; `done()` is true once every rank has ended, `failures()` then names the first that failed."""

    def __init__(
        self, *, run: Path, attempt: int, run_id: str, ranks: int, node: Node, environment: Mapping[str, str], log: Path
    ) -> None:
        self._error: BaseException | None = None
        self._first = len(RankProcess.started)
        self._kills = MemoryKills()
        self._starting = Starting(self._on_their_way, log.parent, ranks=ranks)
        ForkServerContext.Process = RankProcess  # type: ignore[assignment]  # torch takes its processes from there
        server = warm.server_pid()
        assert server is not None, "warm.start() comes first"
        arguments = (str(run), attempt, server, dict(environment))
        self._thread = threading.Thread(
            target=self._host, args=(f"{run_id}-a{attempt}", ranks, node, arguments, log), name="agent", daemon=True
        )
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, *, timeout_s: float) -> None:
        """Wait for the end, so long at most."""
        self._thread.join(timeout_s)

    def stuck(self) -> Ending | None:
        """How the attempt ends where it is certain that ranks of this node will not come into being."""
        why = self._starting.stuck()
        return None if why is None else Ending(status="failed", failure_class="hang", message=why)

    def kill_ranks(self) -> None:
        """End this node's ranks at once, also one that is stopped or has only just begun."""
        for process in RankProcess.started[self._first :]:
            if process.is_alive():
                process.terminate()

    def failures(self) -> dict[int, str]:
        """Rank to how it ended, of this node's ranks that failed and were not ended by us; empty when all ended well.

        Raises:
            Exception: the agent itself failed, as when other nodes did not come.
        """
        assert self.done()
        if self._error is None:
            return {}
        known = getattr(self._error, "failures", None)
        if not known:
            raise self._error
        rank, failure = next(iter(known.items()))
        before = rank - failure.local_rank  # ranks of the nodes before this one
        return {
            before + process.local_rank: self._kills.explained(ended(process.exitcode), process.pid)
            for process in sorted(RankProcess.started[self._first :], key=lambda process: process.local_rank)
            if process.exitcode and not process.ended_by_us
        }

    def _on_their_way(self) -> dict[int, str]:
        ranks = [process.pid for process in RankProcess.started[self._first :]]
        server = warm.server_pid()
        if RankProcess.asked and server is not None:
            return {server: warm.NAME}
        return {pid: "a rank that has just been started" for pid in ranks if pid is not None}

    def _host(self, run_id: str, ranks: int, node: Node, arguments: tuple[Any, ...], log: Path) -> None:
        try:
            with _agent_log(log):
                self._launch(run_id, ranks, node, arguments)
        except BaseException as error:
            self._error = error
        finally:
            for process in RankProcess.started[self._first :]:
                process.discard_error_file()

    def _launch(self, run_id: str, ranks: int, node: Node, arguments: tuple[Any, ...]) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=node.nodes,
            max_nodes=node.nodes,
            nproc_per_node=ranks,
            run_id=run_id,
            rdzv_backend="c10d",
            rdzv_endpoint=node.rendezvous or "127.0.0.1:0",
            rdzv_configs={"is_host": node.rendezvous is None, "join_timeout": node.join_timeout_s},
            local_addr=node.local_address,
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(scratch.folder() / "torchelastic")),  # ranks keep logs of their own
        )
        elastic_launch(config, rank.train)(*arguments)


class RankProcess(ForkServerProcess):
    """A process of the fork server that is remembered with the way it ended.

    torch ends the ranks beside a failed one by `terminate` and waits 30 s (torch.multiprocessing.spawn, 2.13). Ours
    take SIGTERM as a request to stop at the next step, which without their peer never comes: here it kills.
    """

    started: ClassVar[list[RankProcess]] = []  # of this launcher, as they came: torch starts them side by side
    asked: ClassVar[bool] = False  # the fork server has been asked for one more
    ended_by_us = False

    def start(self) -> None:
        arguments: tuple[Any, ...] = self._args  # type: ignore[attr-defined]  # gone later
        if len(arguments) != 4:  # not of torch.multiprocessing.spawn._wrap: a process of our own, as for the data
            super().start()
            return
        _, self.local_rank, _, self._error_file = arguments
        RankProcess.asked = True
        try:
            super().start()
        finally:
            RankProcess.asked = False
        self.started.append(self)

    def discard_error_file(self) -> None:
        """Remove what torch leaves in the temporary folder when a rank fails; its outcome holds the same traceback."""
        Path(self._error_file).unlink(missing_ok=True)

    def terminate(self) -> None:
        self.ended_by_us = True
        self.kill()


def ended(exit_code: int) -> str:
    """How a process ended, in words, from what subprocess and multiprocessing call its exit code."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


class _agent_log:
    """Sends what torch's agent says into a file beside the ranks' logs, not the console; a full disk ends nothing."""

    NAMES = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._handler = logging.StreamHandler(PatientStream(self._handle))
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in self.NAMES:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.propagate = False

    def __exit__(self, *_: object) -> None:
        for name in self.NAMES:
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        os.close(self._handle)
