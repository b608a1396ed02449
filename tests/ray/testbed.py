"""A real Ray of several nodes on this machine: each is a `ray start --block` with its children, ended by SIGKILL."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.jobs.make import descendants, lives, until
from tests.ranks import free_port

BIN = Path(sys.executable).parent
HOLD = Path(__file__).parent.parent / "slurm" / "hold"  # lets a test hold a run at a step while it acts


class RayCluster:
    """A head without resources, with the job server, and `nodes` of 2 cores and 2 pretended GPUs each."""

    def __init__(self, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lray-", dir="/tmp"))  # sockets' names may be 107 characters long
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(HOLD), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_AUTH_MODE": "token",  # other users of the machine stay outside
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.folder),
            "TMPDIR": str(self.folder),  # what a killed node leaves goes with the folder
            "RAY_health_check_timeout_ms": "60000",  # slow is not dead; a node that is gone refuses at once
        }
        self._gcs_port, self._dashboard_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self._dashboard_port}"
        self._head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            self._head = self._start(
                "head", "--head", f"--port={self._gcs_port}", f"--dashboard-port={self._dashboard_port}",
                "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}/ray",
                f"--ray-client-server-port={free_port()}", "--num-cpus=0", "--num-gpus=0",
            )  # fmt: skip
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.close()
            raise

    def add_node(self) -> subprocess.Popen[bytes]:
        """One more node, once the head counts it."""
        options = (f"--address=127.0.0.1:{self._gcs_port}", "--num-cpus=2", "--num-gpus=2")
        self.nodes.append(self._start(f"node-{len(self.nodes)}", *options))
        return self.nodes[-1]

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """As a node whose power fails: everything on it is gone at once. Returns when the head knows."""
        before = self._alive()
        _kill(node)
        until("the head misses the node", lambda: self._alive() < before, timeout_s=180)

    def node_with(self, pid: int) -> subprocess.Popen[bytes]:
        """The node on which a process runs."""
        return next(node for node in self.nodes if pid in descendants(node.pid))

    def close(self) -> None:
        for process in [*self.nodes, *([self._head] if self._head else [])]:
            _kill(process)
        for pid in with_argument(str(self.folder)):  # left by a `ray start` that gave up
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """A `ray start` that has come up. It gives up after 30 s, which are few where much else runs: then again."""
        before, log = self._alive(), self.folder / f"{name}.log"
        for _ in range(6):
            process = self._process(log, *options)
            try:
                until(f"{name} is up", lambda p=process: p.poll() is not None or self._alive() > before, timeout_s=180)
            except AssertionError as error:
                _kill(process)
                raise AssertionError(f"{error}\n{log.read_text()[-4000:]}") from None
            if process.poll() is None:
                return process
            _kill(process)
        raise AssertionError(f"{name} does not come up\n{log.read_text()[-4000:]}")

    def _process(self, log: Path, *options: str) -> subprocess.Popen[bytes]:
        common = (
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=80000000",
            "--dashboard-agent-listen-port=0",
        )
        with log.open("ab") as stream:
            return subprocess.Popen(
                [str(BIN / "ray"), "start", *options, *common], env=self.environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip

    def _alive(self) -> int:
        """Nodes that the head counts, itself included; 0 until its job server answers."""
        time.sleep(0.2)  # the head has other work
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        asked = urllib.request.Request(f"{self.address}/nodes?view=summary", headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                nodes: list[dict[str, Any]] = json.load(answer)["data"]["summary"]
        except (OSError, ValueError, LookupError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it, children first looked up, so that none starts another meanwhile."""
    deadline = time.monotonic() + 30
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
    below = descendants(process.pid)  # none once it has ended: it ends them itself
    while below and time.monotonic() < deadline:
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        below = [pid for pid in {*below, *descendants(process.pid)} if lives(pid)]
        time.sleep(0.02)
    process.kill()
    process.wait()


def with_argument(text: str) -> list[int]:
    """Processes whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
