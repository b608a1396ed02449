"""The API server that a kubeconfig leads to, asked by the official client, which is imported in functions alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import UserError

TIMEOUT_S = (5, 30)  # to connect, to answer
KUEUE = ("v1beta2", "v1beta1")
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


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
                kind.group, kind.version, namespace, kind.plural, dict(body), _request_timeout=TIMEOUT_S, **options
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
                kind.group, kind.version, namespace, kind.plural, name, _request_timeout=TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return {"kind": kind.kind, **found}

    def delete(self, kind: Kind, namespace: str, name: str) -> None:
        self.custom.delete_namespaced_custom_object(
            kind.group, kind.version, namespace, kind.plural, name,
            propagation_policy="Foreground", _request_timeout=TIMEOUT_S,
        )  # fmt: skip

    def workload(self, namespace: str, uid: str) -> dict[str, Any] | None:
        """Kueue's object for a job; None where it is not to be had."""
        from kubernetes.client import ApiException

        for version in KUEUE:
            try:
                found = self.custom.list_namespaced_custom_object(
                    "kueue.x-k8s.io", version, namespace, "workloads",
                    label_selector=f"kueue.x-k8s.io/job-uid={uid}", _request_timeout=TIMEOUT_S,
                )  # fmt: skip
            except ApiException:
                continue
            return next(iter(found.get("items", [])), None)
        return None

    def pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """Pods in the order of their names' numbers."""
        answer = self.core.list_namespaced_pod(
            namespace, label_selector=selector, _preload_content=False, _request_timeout=TIMEOUT_S
        )
        return sorted(json.loads(answer.data)["items"], key=_node_rank)

    def log(self, namespace: str, pod: str) -> Iterator[str]:
        from kubernetes.client import ApiException

        try:
            answer = self.core.read_namespaced_pod_log(
                pod, namespace, _preload_content=False, _request_timeout=TIMEOUT_S
            )
        except ApiException as error:
            yield f"(no log: {_message(error)})"
            return
        yield from answer.data.decode(errors="replace").splitlines()

    def exists(self, read: Any, name: str, namespace: str) -> dict[str, Any] | None:
        """The object that `read` finds; None if there is none, {} if this user may not look."""
        from kubernetes.client import ApiException

        try:
            answer = read(name, namespace, _preload_content=False, _request_timeout=TIMEOUT_S)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status == 403:
                return {}
            raise
        found: dict[str, Any] = json.loads(answer.data)
        return found


def connect(context: str | None = None, *, by_hand: bool = False) -> Server:
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
