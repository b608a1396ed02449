"""Keys `cluster.ray`: which Ray cluster a job runs on and what each node's agent asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from launcher.errors import Problem

LOCAL = "local"
_OWN_KEYS = {  # resources that Ray counts itself, and the key that says how many
    "CPU": "cluster.ray.cpus_per_node",
    "GPU": "cluster.nproc_per_node",
    "memory": "no key: Ray does not hold processes to it",
    "object_store_memory": "no key: the ranks do not use it",
}


@dataclass(kw_only=True, slots=True)
class Ray:
    """Which Ray cluster, and what each node's agent asks of it.

    address: http://HOST:8265 of a cluster's job server, or local for a fresh cluster on this machine; null: what
        RAY_ADDRESS says
    cpus_per_node: cores that each agent reserves; null: one a rank
    resources: custom resources that each agent reserves, by name
    working_dir: folder whose files are shipped to the nodes and become the agents' directory; null: only the recipe
    pip: packages that Ray installs on the nodes before the agents start
    autoscaling: whether the cluster adds nodes that a job waits for; false: a job that asks for more than there are
        is refused
    """

    address: str | None = None
    cpus_per_node: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    working_dir: str | None = None
    pip: list[str] = field(default_factory=list)
    autoscaling: bool = False


def check(ray: Ray) -> Iterator[Problem]:
    """Rules of these keys alone."""
    if ray.address is not None and (problem := address_problem(ray.address)):
        yield Problem("cluster.ray.address", ray.address, *problem)
    if ray.cpus_per_node is not None and ray.cpus_per_node < 1:
        yield Problem("cluster.ray.cpus_per_node", ray.cpus_per_node, "1 core or more, or null")
    for name, amount in ray.resources.items():
        if name in _OWN_KEYS:
            expected = "custom resources, as {rack_a: 1}"
            yield Problem("cluster.ray.resources", ray.resources, expected, f"For {name}: {_OWN_KEYS[name]}.")
        elif not amount > 0:
            yield Problem(f"cluster.ray.resources.{name}", amount, "a number above 0")
    for index, package in enumerate(ray.pip):
        if not package.strip() or package.lstrip().startswith("-"):
            yield Problem(f"cluster.ray.pip.{index}", package, "a requirement, as trl==0.24.0")


def address_problem(address: str) -> tuple[str, str] | None:
    """What would be expected in place of this job server's address, and the fix; None where it is one."""
    expected = f"http://HOST:8265 of the cluster's job server, or {LOCAL}"
    if address == LOCAL:
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return expected, f"{error}."
    if parts.scheme == "ray":
        fix = f"Use http://{host or 'HOST'}:8265: ray:// is Ray Client, whose jobs end when this machine disconnects."
        return expected, fix
    if address == "auto":
        fix = f"Use http://127.0.0.1:8265 for a cluster that runs here, or cluster.ray.address={LOCAL} for a fresh one."
        return expected, fix
    if parts.scheme not in ("http", "https"):
        name = address.rpartition("/")[2].partition(":")[0]
        return expected, f"Use http://{name or 'HOST'}:8265 (the dashboard's port, not the head's 6379)."
    if not host or port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
        return expected, f"Use {parts.scheme}://{host or 'HOST'}:{port or 8265}."
    return None
