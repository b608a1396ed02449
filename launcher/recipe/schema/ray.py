"""Keys `cluster.ray`: which Ray cluster a job runs on and what each node's agent asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Ray:
    """Which Ray cluster, and what each node's agent asks of it.

    address: http://HOST:8265 of a cluster's job server, or local for a fresh cluster on this machine; null: what
        RAY_ADDRESS says
    cpus_per_node: cores that each agent reserves; null: one a rank
    resources: custom resources that each agent reserves, by name
    working_dir: folder whose files are shipped to the nodes and become the agents' directory; null: only the recipe
    pip: packages that Ray installs on the nodes before the agents start
    """

    address: str | None = None
    cpus_per_node: int | None = None
    resources: dict[str, float] = field(default_factory=dict)
    working_dir: str | None = None
    pip: list[str] = field(default_factory=list)


def check(ray: Ray) -> Iterator[Problem]:
    """Rules of these keys alone."""
    if ray.cpus_per_node is not None and ray.cpus_per_node < 1:
        yield Problem("cluster.ray.cpus_per_node", ray.cpus_per_node, "1 core or more, or null")
