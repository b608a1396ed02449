"""Asking the API server by the official Python client, which is imported here and only in functions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import UserError
from launcher.jobs.job import Job, JobStatus
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets.kubernetes_status import status_of

_TIMEOUT_S = (5, 30)  # to connect, to answer
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_NAMES_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"  # of a Secret, never what it holds
_KUEUE = ("v1beta2", "v1beta1")


class Kind(NamedTuple):
    """Where objects of a kind live, whose operator makes something of them, and how their pods are found."""

    kind: str
    group: str
    version: str
    plural: str
    operator: str
    pods: str  # label selector, of the JobSet's name or the Ray cluster's
    speaking: str  # label selector of the pods whose output is the job's


_JOB_SET_PODS = "jobset.sigs.k8s.io/jobset-name={}"
KINDS = {
    "jobset": Kind("JobSet", "jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", _JOB_SET_PODS, _JOB_SET_PODS),
    "trainjob": Kind(
        "TrainJob", "trainer.kubeflow.org", "v1alpha1", "trainjobs", "Kubeflow Trainer", _JOB_SET_PODS, _JOB_SET_PODS
    ),
    "rayjob": Kind(
        "RayJob", "ray.io", "v1", "rayjobs", "KubeRay", "ray.io/cluster={}", "batch.kubernetes.io/job-name={}"
    ),
}  # fmt: skip


def submit(spec: JobSpec, manifest: str, folder: Path) -> Job:
    """Create the ConfigMap and the job, after the server has tried the job without keeping it.

    Raises:
        UserError: no client, no context, something is not there that the pods need, or the server refused; nothing is
            left there.
    """
    import yaml

    config, body = yaml.safe_load_all(manifest)
    server = _connect(by_hand=True)
    namespace, name = spec.cluster.kubernetes.namespace or server.namespace, body["metadata"]["name"]
    kind = KINDS[spec.cluster.kubernetes.kind]
    with server.asked(f"{kind.kind} {name} in namespace {namespace}"):
        _require_parts(server, spec, namespace)
        server.create(kind, namespace, body, dry_run="All")
        server.core.create_namespaced_config_map(namespace, config, _request_timeout=_TIMEOUT_S)
        try:
            made = server.create(kind, namespace, body)
        except BaseException:
            server.core.delete_namespaced_config_map(name, namespace, _request_timeout=_TIMEOUT_S)
            raise
        server.core.patch_namespaced_config_map(name, namespace, _owned_by(made), _request_timeout=_TIMEOUT_S)
    more = {"kind": spec.cluster.kubernetes.kind, "namespace": namespace, "context": server.context}
    return Job(target="kubernetes", id=name, folder=folder, run=Path(spec.run), more=more)


def status(job: Job) -> JobStatus:
    """`unknown` where the server cannot be asked or has no such object."""
    try:
        server, kind, namespace = _connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
        with server.asked(f"{kind.kind} {job.id}"):
            found = server.get(kind, namespace, job.id)
            if found is None:
                gone = f"{kind.kind} {job.id} is not in namespace {namespace}: deleted, or removed after its end"
                return JobStatus("unknown", f"{gone}. How the run stands is in its directory, {job.run}")
            workload = server.workload(namespace, found["metadata"].get("uid", "")) if _queue_of(found) else None
            cluster = found.get("status", {}).get("rayClusterName") if found["kind"] == "RayJob" else job.id
            pods = server.pods(namespace, kind.pods.format(cluster)) if cluster else []
            return status_of(found, pods=pods, workload=workload)
    except UserError as error:
        return JobStatus("unknown", str(error))


def logs(job: Job) -> Iterator[str]:
    """Lines pod by pod, each with its pod's name where there are several."""
    server, kind, namespace = _connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
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
    server, kind, namespace = _connect(job.more.get("context")), KINDS[job.more["kind"]], job.more["namespace"]
    with server.asked(f"{kind.kind} {job.id}"):
        if server.get(kind, namespace, job.id) is None:
            raise UserError(f"{kind.kind} {job.id} is not in namespace {namespace}: there is nothing to cancel.")
        server.delete(kind, namespace, job.id)


# the server


@dataclass(frozen=True, slots=True)
class Server:
    """An API server, by one context of the kubeconfig."""

    client: Any  # kubernetes.client.ApiClient
    context: str
    namespace: str

    @property
    def core(self) -> Any:
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self.client)

    @property
    def custom(self) -> Any:
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi(self.client)

    @contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Say refusals and silence as UserErrors.

        what: the object in question
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise UserError(
                f"{what}: the API server refused ({error.status} {error.reason}): {_message(error)}"
            ) from None
        except HTTPError as error:
            host = self.client.configuration.host
            raise UserError(f"{what}: no answer from the API server at {host} ({_cause(error)}).") from None

    def create(self, kind: Kind, namespace: str, body: Mapping[str, Any], **options: str) -> dict[str, Any]:
        """The object as the server made it.

        Raises:
            UserError: the server knows no such kind, or has one of this name.
        """
        from kubernetes.client import ApiException

        try:
            made: dict[str, Any] = self.custom.create_namespaced_custom_object(
                kind.group, kind.version, namespace, kind.plural, dict(body), _request_timeout=_TIMEOUT_S, **options
            )
        except ApiException as error:
            name = body["metadata"]["name"]
            if error.status == 404:
                raise UserError(
                    f"{kind.kind}: the cluster of context {self.context} has no {kind.group}/{kind.version}, or no "
                    f"namespace {namespace}. Its operator, {kind.operator}, must be installed (docs/kubernetes.md)."
                ) from None
            if error.status == 409:
                raise UserError(
                    f"{kind.kind} {name} exists already in namespace {namespace}. If it is over: "
                    f"kubectl delete {kind.plural} {name} -n {namespace}; else give run.name another value."
                ) from None
            raise
        return made

    def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        from kubernetes.client import ApiException

        try:
            found: dict[str, Any] = self.custom.get_namespaced_custom_object(
                kind.group, kind.version, namespace, kind.plural, name, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return {"kind": kind.kind, **found}

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        self.custom.delete_namespaced_custom_object(
            kind.group, kind.version, namespace, kind.plural, name,
            propagation_policy="Foreground", _request_timeout=_TIMEOUT_S,
        )  # fmt: skip

    def workload(self, namespace: str, uid: str) -> dict[str, Any] | None:
        """Kueue's object for a job; None where it is not to be had."""
        from kubernetes.client import ApiException

        for version in _KUEUE:
            try:
                found = self.custom.list_namespaced_custom_object(
                    "kueue.x-k8s.io", version, namespace, "workloads",
                    label_selector=f"kueue.x-k8s.io/job-uid={uid}", _request_timeout=_TIMEOUT_S,
                )  # fmt: skip
            except ApiException:
                continue
            return next(iter(found.get("items", [])), None)
        return None

    def pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """Pods in the order of their names' numbers."""
        answer = self.core.list_namespaced_pod(
            namespace, label_selector=selector, _preload_content=False, _request_timeout=_TIMEOUT_S
        )
        return sorted(json.loads(answer.data)["items"], key=_node_rank)

    def log(self, namespace: str, pod: str) -> Iterator[str]:
        from kubernetes.client import ApiException

        try:
            answer = self.core.read_namespaced_pod_log(
                pod, namespace, _preload_content=False, _request_timeout=_TIMEOUT_S
            )
        except ApiException as error:
            yield f"(no log: {_message(error)})"
            return
        yield from answer.data.decode(errors="replace").splitlines()

    def exists(self, read: Any, name: str, namespace: str) -> dict[str, Any] | None:
        """The object that `read` finds; None if there is none, {} if this user may not look."""
        from kubernetes.client import ApiException

        try:
            answer = read(name, namespace, _preload_content=False, _request_timeout=_TIMEOUT_S)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status == 403:
                return {}
            raise
        found: dict[str, Any] = json.loads(answer.data)
        return found


def _connect(context: str | None = None, *, by_hand: bool = False) -> Server:
    """The server of a context of the kubeconfig, of its current one, or of the pod that this runs in.

    by_hand: whether the text of an error says how kubectl would submit

    Raises:
        UserError: no client, no kubeconfig, no such context.
    """
    hint = (
        " Nothing was submitted. By hand: launcher render RECIPE --target kubernetes -o job && "
        "kubectl create -f job/job.yaml"
        if by_hand
        else ""
    )
    try:
        from kubernetes import client, config
    except ImportError:
        raise UserError(
            f"The Kubernetes client is not installed here: pip install 'train-launcher[kubernetes]'.{hint}"
        ) from None
    file, settings = os.environ.get("KUBECONFIG") or None, client.Configuration()
    try:
        contexts, current = config.list_kube_config_contexts(config_file=file)
        chosen = next((c for c in contexts if c["name"] == context), None) if context else current
        if chosen is None:
            names = ", ".join(c["name"] for c in contexts)
            raise UserError(f"kubeconfig: no context {context!r}, by which the job was submitted. There are: {names}.")
        config.load_kube_config(config_file=file, context=chosen["name"], client_configuration=settings)
        name, namespace = chosen["name"], chosen["context"].get("namespace") or "default"
    except config.ConfigException as error:
        try:
            config.load_incluster_config(client_configuration=settings)
            name, namespace = "", _SERVICE_ACCOUNT.read_text().strip()
        except (config.ConfigException, OSError):
            where = file or "~/.kube/config"
            text = f"No Kubernetes context: {str(error).rstrip('.')} ({where}; KUBECONFIG names another file).{hint}"
            raise UserError(text) from None
    settings.retries = 1
    return Server(client.ApiClient(settings), name, namespace)


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
    for version in _KUEUE:
        try:
            server.custom.get_namespaced_custom_object(
                "kueue.x-k8s.io", version, namespace, "localqueues", queue, _request_timeout=_TIMEOUT_S
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


def _node_rank(pod: Mapping[str, Any]) -> tuple[int, str]:
    index = pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", "0")
    return int(index), pod["metadata"]["name"]


def _message(error: Any) -> str:
    """The server's own words."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".") + "."
    except (KeyError, TypeError, ValueError):
        return f"{error.body or 'without a reason'}".strip()


def _cause(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason if reason is not None else error)
