"""Whether nodes reach each other on any port, and how far their clocks are apart: node 0 answers with its time.

Ranks meet on ports that the kernel chooses, so a firewall that lets only the rendezvous through hangs them all later.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0  # the machine may be busy; a connection alone proves that there is a way
_ROUNDS = 3
_TIME = struct.Struct("!d")


class Echo:
    """Node 0's part: answers each byte with the time, on a port of the kernel's choice, until closed."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("", 0), backlog=4096)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, name="echo", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), name="echo", daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            while connection.recv(1):
                connection.sendall(_TIME.pack(time.time()))
        except OSError:
            return


def measure(host: str, port: int) -> dict[str, Any]:
    """Another node's part: by how much its own clock is ahead of node 0's.

    Returns:
        offset_s and round_trip_s of the quickest of some rounds, or error where node 0 cannot be reached there
    """
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
    except OSError as error:
        return {"error": f"{host}:{port}: {error.strerror or error}"}
    with connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rounds = []
        try:
            for _ in range(_ROUNDS):
                sent = time.time()
                connection.sendall(b"?")
                (theirs,) = _TIME.unpack(_exactly(connection, _TIME.size))
                came = time.time()
                rounds.append((came - sent, (sent + came) / 2 - theirs))
        except OSError:
            if not rounds:
                return {"offset_s": None, "round_trip_s": None}
        round_trip, offset = min(rounds)
        return {"offset_s": offset, "round_trip_s": round_trip}


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("node 0 closed the connection")
        data += more
    return data
