"""Submit, status, logs and cancel on Kubernetes: what is asked of the API server, and what must be there before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.jobs.job import Job, JobStatus
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets.kubernetes_server import KINDS, KUEUE, TIMEOUT_S, Server, connect
from launcher.jobs.targets.kubernetes_status import status_of

_NAMES_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"  # of a Secret, never what it holds


def submit(spec: JobSpec, manifest: str, folder: Path) -> Job:
    """Create the ConfigMap and the job, after the server has tried the job without keeping it.

    Raises:
        UserError: no client, no context, something is not there that the pods need, or the server refused; nothing is
            left there.
    """
    import yaml

    config, body = yaml.safe_load_all(manifest)
    server = connect(by_hand=True)
    namespace, name = spec.cluster.kubernetes.namespace or server.namespace, body["metadata"]["name"]
    kind = KINDS[spec.cluster.kubernetes.kind]
    with server.asked(f"{kind.kind} {name} in namespace {namespace}"):
        _require_parts(server, spec, namespace)
        server.create(kind, namespace, body, dry_run="All")
        server.core.create_namespaced_config_map(namespace, config, _request_timeout=TIMEOUT_S)
        try:
            made = server.create(kind, namespace, body)
        except BaseException:
            server.core.delete_namespaced_config_map(name, namespace, _request_timeout=TIMEOUT_S)
            raise
        server.core.patch_namespaced_config_map(name, namespace, _owned_by(made), _request_timeout=TIMEOUT_S)
    more = {"kind": spec.cluster.kubernetes.kind, "namespace": namespace, "context": server.context}
    return Job(target="kubernetes", id=name, folder=folder, run=Path(spec.run), more=more)


def status(job: Job) -> JobStatus:
    """`unknown` where the server cannot be asked or has no such object."""
    try:
        server, kind, namespace = connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
        with server.asked(f"{kind.kind} {job.id}"):
            found = server.get(kind, namespace, job.id)
            if found is None:
                gone = f"{kind.kind} {job.id} is not in namespace {namespace}: deleted, or removed after its end"
                return JobStatus("unknown", f"{gone}. How the run stands is in its directory, {job.run}")
            workload = server.workload(namespace, found["metadata"].get("uid", "")) if _queue_of(found) else None
            cluster = found.get("status", {}).get("rayClusterName") if found["kind"] == "RayJob" else job.id
    except UserError as error:
        return JobStatus("unknown", str(error))
    pods: list[dict[str, Any]] = []
    with suppress(UserError), server.asked("pods"):  # a user who may not look at them still learns the state
        pods = server.pods(namespace, kind.pods.format(cluster)) if cluster else []
    return status_of(found, pods=pods, workload=workload)


def logs(job: Job) -> Iterator[str]:
    """Lines pod by pod, each with its pod's name where there are several."""
    server, kind, namespace = connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
    with server.asked(f"pods of {kind.kind} {job.id}"):
        pods = server.pods(namespace, kind.speaking.format(job.id))
        if not pods:
            reason = status(job)
            raise UserError(
                f"{kind.kind} {job.id} has no pods in namespace {namespace} ({reason.state}: {reason.reason}). "
                f"What the ranks printed is in {job.run}/logs, on the claim."
            )
        for pod in pods:
            name = pod["metadata"]["name"]
            prefix = f"{name}: " if len(pods) > 1 else ""
            yield from (f"{prefix}{line}" for line in server.log(namespace, name))


def cancel(job: Job) -> None:
    """Delete the job in the foreground: it stays in sight until its pods, which got SIGTERM, have ended."""
    server, kind, namespace = connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
    with server.asked(f"{kind.kind} {job.id}"):
        if server.get(kind, namespace, job.id) is None:
            raise UserError(f"{kind.kind} {job.id} is not in namespace {namespace}: there is nothing to cancel.")
        server.delete(kind, namespace, job.id)


def _require_parts(server: Server, spec: JobSpec, namespace: str) -> None:
    """Raises UserError where the claim, the Secret or the queue that pods wait for is not there."""
    k8s = spec.cluster.kubernetes
    key = "cluster.kubernetes"
    claim = server.exists(server.core.read_namespaced_persistent_volume_claim, k8s.claim or "", namespace)
    if claim is None:
        raise UserError(f"{key}.claim = {k8s.claim}: namespace {namespace} has no PersistentVolumeClaim of that name.")
    modes = claim.get("spec", {}).get("accessModes", ["ReadWriteMany"])
    if "ReadWriteMany" not in modes and spec.nodes > 1:
        raise UserError(
            f"{key}.claim = {k8s.claim}: expected a claim with ReadWriteMany for {spec.nodes} nodes, it has "
            f"{', '.join(modes)}."
        )
    if k8s.secret is not None and spec.env_names and server.exists(_secret_name(server), k8s.secret, namespace) is None:
        raise UserError(
            f"{key}.secret = {k8s.secret}: namespace {namespace} has no Secret of that name. Make it by: kubectl "
            f"create secret generic {k8s.secret} -n {namespace} --from-literal={spec.env_names[0]}=..."
        )
    if k8s.queue is not None:
        _require_queue(server, k8s.queue, namespace)


def _secret_name(server: Server) -> Any:
    """A way to look for a Secret that never asks for its values."""

    def read(name: str, namespace: str, **options: Any) -> Any:
        from kubernetes.client import ApiClient, CoreV1Api

        names_only = ApiClient(server.client.configuration, header_name="Accept", header_value=_NAMES_ONLY)
        return CoreV1Api(names_only).read_namespaced_secret(name, namespace, **options)

    return read


def _require_queue(server: Server, queue: str, namespace: str) -> None:
    from kubernetes.client import ApiException

    missing = False
    for version in KUEUE:
        try:
            server.custom.get_namespaced_custom_object(
                "kueue.x-k8s.io", version, namespace, "localqueues", queue, _request_timeout=TIMEOUT_S
            )
            return
        except ApiException as error:
            missing = missing or error.status == 404
    if missing:
        raise UserError(
            f"cluster.kubernetes.queue = {queue}: namespace {namespace} has no LocalQueue of that name, or the cluster "
            "has no Kueue; the job would stay suspended."
        )


def _owned_by(job: Mapping[str, Any]) -> dict[str, Any]:
    """A patch after which an object goes with the job."""
    owner = {
        "apiVersion": job["apiVersion"], "kind": job["kind"],
        "name": job["metadata"]["name"], "uid": job["metadata"]["uid"],
    }  # fmt: skip
    return {"metadata": {"ownerReferences": [owner]}}


def _queue_of(job: Mapping[str, Any]) -> str | None:
    queue: str | None = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    return queue
