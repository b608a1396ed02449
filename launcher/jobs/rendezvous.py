"""HOST:PORT at which the nodes of a job meet: read, and its port found free on node 0 before anything else happens."""

from __future__ import annotations

import errno
import socket
import time

from launcher.errors import UserError

_TAKEN = "is taken on this machine"


def address(text: str | None, *, name: str) -> tuple[str, int]:
    """Host and port of `text`; `name` is where it was given, as `--rendezvous`.

    Raises:
        UserError: it is no HOST:PORT.
    """
    host, _, port = (text or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{name} {text}: expected HOST:PORT on node 0, with a port from 1 to 65535.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def require_free_port(port: int, *, name: str, wait_s: float = 0.0) -> None:
    """Raises UserError where this machine, node 0, cannot listen on the port; waits so long for it to become free."""
    deadline = time.monotonic() + wait_s
    while (problem := _problem(port)) is not None:
        if time.monotonic() >= deadline:
            raise UserError(f"{name}: port {port} {problem}. Choose another.")
        time.sleep(0.2)


def taken(endpoint: str, *, name: str) -> UserError:
    """Said where somebody else listens already; on node 0 that is mostly a second start of it."""
    port = address(endpoint, name=name)[1]
    return UserError(
        f"{name} {endpoint}: port {port} {_TAKEN}. Is another node 0 running here? Else choose another port."
    )


def _problem(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return _TAKEN if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
    return None
