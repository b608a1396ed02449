"""Several machines on one: network namespaces behind a switch, each with an address and a name that all know."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import pytest

from tests.jobs.make import launcher

_number = itertools.count()


class Machines:
    """`count` namespaces, node0, node1, ..., whose cables can be pulled; gone when left, with nothing behind.

    addresses: of each, in a network of their own without a way out
    """

    def __init__(self, count: int) -> None:
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        unique = f"lt{os.getpid()}x{next(_number)}"
        self.names = [f"{unique}n{i}" for i in range(count)]
        self._switch = f"{unique}sw"
        self._started: list[subprocess.Popen[str]] = []
        self._hosts = Path(tempfile.mkdtemp(prefix="launcher-netns-"), "hosts")
        lines = [f"{address} node{i}\n" for i, address in enumerate(self.addresses)]
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def __enter__(self) -> Machines:
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        for name in (*self.names, self._switch):  # interfaces go with their namespace
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(self._hosts.parent, ignore_errors=True)

    def command(self, node: int, *words: str) -> list[str]:
        """What runs a command on a machine, under its host name; the process that is started becomes the command."""
        # `ip netns exec` gives mounts of its own; without name servers a name that is in no file is unknown at once
        mounts = f"mount --bind {self._hosts} /etc/hosts && mount --bind /dev/null /etc/resolv.conf"
        named = f'{mounts} && hostname node{node} && exec "$@"'
        return ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", named, "sh", *words]

    def launcher(self, node: int, *arguments: object, **more: object) -> subprocess.Popen[str]:
        """A `launcher` process on a machine, as `tests.jobs.make.launcher` starts one here."""
        process = launcher(*map(str, arguments), prefix=self.command(node), **more)
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill the `launcher` processes that are left, and those they left, which would keep their pipes open."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self._started.clear()

    def cable(self, node: int, *, plugged: bool) -> None:
        """Pull or plug the cable of a machine: packets are lost, nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "up" if plugged else "down")

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for node, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            _ip("netns", "add", name)
            port = f"port{node}"
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")


def require() -> None:
    """Skips the test where this machine cannot have network namespaces."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: iproute2, util-linux)")
    try:
        with Machines(1):
            return
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
