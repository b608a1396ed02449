"""By which of this machine's network interfaces the nodes of a job talk: the named one, or that of the route to node 0.

It is settled here and told to gloo, NCCL and torch by name, because each of them guesses otherwise.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, nearest

_SIOCGIFADDR = 0x8915  # netdevice(7)
_INET6 = Path("/proc/net/if_inet6")
_ROUTES = Path("/proc/net/route")
# NCCL takes a bare name as a prefix, `=name` as it is
_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "TP_SOCKET_IFNAME": "{}"}


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface and the address by which other nodes reach this one. name: empty where it cannot be told."""

    name: str
    address: str
    why: str = ""

    def environment(self) -> dict[str, str]:
        """Variables for the ranks; what the user has set stays."""
        if not self.name:
            return {}
        return {name: text.format(self.name) for name, text in _VARIABLES.items() if name not in os.environ}

    def __str__(self) -> str:
        kept = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
        said = f"; {', '.join(kept)} set in the environment stays" if kept else ""
        return f"network interface {self.name or 'unknown'}, address {self.address}: {self.why}{said}"


def interfaces() -> dict[str, list[str]]:
    """Addresses of each interface that has one; IPv4 first, of which the first one alone is seen."""
    found: dict[str, list[str]] = {}
    for name, address in [*_ipv4(), *_ipv6()]:
        found.setdefault(name, []).append(address)
    return found


def choose(host: str, *, wanted: str | None) -> Interface:
    """The interface named by cluster.network_interface, else the one that leads to `host`; no packet is sent.

    Raises:
        UserError: there is no such interface, it has no address, or nothing leads to the host.
    """
    found = interfaces()
    if wanted is not None:
        if wanted not in found:
            known = ", ".join(f"{name} ({addresses[0]})" for name, addresses in found.items())
            raise UserError(
                f"cluster.network_interface = {wanted}: expected an interface of {socket.gethostname()} that has an "
                f"address: {known or 'none has'}. {nearest(wanted, found)}".rstrip()
            )
        return Interface(wanted, found[wanted][0], "cluster.network_interface")
    address = towards(host)
    if ipaddress.ip_address(address).is_loopback and not _names_loopback(host):
        # node 0, whose own name leads to itself: 127.0.1.1 on Debian
        name = _default_route()
        if name is None or name not in found:
            raise UserError(
                f"--rendezvous {host}: on this machine it is {address}, which no other node reaches. Give node 0's "
                "address, or name the interface: cluster.network_interface"
            )
        return Interface(name, found[name][0], f"carries the default route ({host} is {address} here)")
    name = next((name for name, addresses in found.items() if address in addresses), None) or _routed(address) or ""
    return Interface(name, address, f"leads to {host}")


def towards(host: str) -> str:
    """This machine's address on the way to a host.

    Raises:
        UserError: the name is not known, or no route leads there.
    """
    problem: OSError | None = None
    for family, _, _, _, where in resolve(host):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((where[0], 9, *where[2:]))
                return str(probe.getsockname()[0])
        except OSError as error:
            problem = error
    said = problem.strerror if problem else "no address"
    raise UserError(f"--rendezvous {host}: this machine cannot reach it ({said}). Give an address of node 0.")


def resolve(host: str) -> list[tuple[socket.AddressFamily, int, int, str, tuple[str | int, ...]]]:
    """Addresses of a host, IPv4 first.

    Raises:
        UserError: the name is not known here.
    """
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--rendezvous {host}: expected a name or address of node 0 that {socket.gethostname()} knows ({said})."
        ) from None
    return sorted(found, key=lambda item: item[0] != socket.AF_INET)  # type: ignore[arg-type]


def is_here(host: str) -> bool:
    """Whether a host is this machine: one of its addresses can be listened on."""
    for family, _, _, _, where in resolve(host):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((where[0], 0, *where[2:]))
                return True
        except OSError:
            continue
    return False


def _names_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ipv4() -> Iterator[tuple[str, str]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            yield name, socket.inet_ntoa(answer[20:24])


def _ipv6() -> Iterator[tuple[str, str]]:
    try:
        lines = _INET6.read_text().splitlines()
    except OSError:
        return
    for digits, *_, name in map(str.split, lines):
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            yield name, str(address)


def _routes() -> list[tuple[ipaddress.IPv4Network, str]]:
    """Destinations of the main table and their interfaces, the narrowest first."""
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return []
    found = []
    for line in lines:
        name, destination, _, _, _, _, _, mask, *_ = line.split()
        network, bits = (socket.ntohl(int(digits, 16)) for digits in (destination, mask))
        found.append((ipaddress.IPv4Network((network, bits.bit_count())), name))
    return sorted(found, key=lambda route: -route[0].prefixlen)


def _default_route() -> str | None:
    """Interface of the default route; where there is none, of the only other route there is."""
    names = [name for network, name in _routes() if network.prefixlen == 0]
    return next(iter(names or sorted({name for _, name in _routes()})), None)


def _routed(address: str) -> str | None:
    """Interface whose network holds a second address of this machine."""
    where = ipaddress.ip_address(address)
    return next((name for network, name in _routes() if network.prefixlen and where in network), None)
