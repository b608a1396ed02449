"""Keys `cluster.kubernetes`: the kind of job and what its pods look like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.errors import Problem


@dataclass(kw_only=True, slots=True)
class Kubernetes:
    """The kind of job and what its pods look like.

    kind: jobset (JobSet), trainjob (Kubeflow Trainer) or rayjob (KubeRay)
    namespace: where the job lives; null: the one of the current context
    image: container image that holds launcher and its extras; required by this target
    pull_secrets: names of the Secrets for a private registry
    claim: name of a ReadWriteMany PersistentVolumeClaim that holds the run directory; required by this target
    mount: where the claim is mounted; run.dir lies below it
    secret: name of the Secret whose keys are the variables of cluster.env
    service_account: of the pods; null: the namespace's default
    queue: Kueue's LocalQueue; null: no Kueue
    priority_class: Kueue's WorkloadPriorityClass with a queue, else the pods' PriorityClass
    topology: node label whose value all pods shall share, for Kueue's topology-aware scheduling; null: any nodes
    topology_required: whether the job waits rather than spread over several values of `topology`
    gpu_resource: name of the GPU resource
    cpus: cores requested for a node's pod; null: none
    memory: memory requested for a node's pod, as 512Gi; null: none
    shm: size of /dev/shm of a node's pod
    node_selector: labels that nodes must have
    tolerations: taints that pods tolerate, as Kubernetes writes them
    labels: put on the job
    annotations: put on the job
    ttl_s: seconds after which a finished job is removed, of a rayjob its cluster; null: kept; not for trainjob
    runtime: name of the ClusterTrainingRuntime; for trainjob
    ray_version: Ray's version in the image, which KubeRay is told; null: left to KubeRay; for rayjob
    """

    kind: Literal["jobset", "trainjob", "rayjob"] = "jobset"
    namespace: str | None = None
    image: str | None = None
    pull_secrets: list[str] = field(default_factory=list)
    claim: str | None = None
    mount: str = "/shared"
    secret: str | None = None
    service_account: str | None = None
    queue: str | None = None
    priority_class: str | None = None
    topology: str | None = None
    topology_required: bool = False
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    shm: str = "16Gi"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    ttl_s: int | None = None
    runtime: str = "torch-distributed"
    ray_version: str | None = None


def check(kubernetes: Kubernetes) -> Iterator[Problem]:
    """Rules of these keys alone."""
    if kubernetes.ttl_s is not None and kubernetes.ttl_s < 0:
        yield Problem("cluster.kubernetes.ttl_s", kubernetes.ttl_s, "0 seconds or more, or null")
