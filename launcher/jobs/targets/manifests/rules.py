"""What Kubernetes and the operators ask beside their schemas: names, lengths, labels, quantities, keys together.

From the API's validation and the operators' webhooks: JobSet 0.12, Kubeflow Trainer 2.3, KubeRay 1.7, Kueue 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

QUEUE = "kueue.x-k8s.io/queue-name"
TOPOLOGY = ("kueue.x-k8s.io/podset-required-topology", "kueue.x-k8s.io/podset-preferred-topology")
CONFIG_MAP_BYTES = 1 << 20
RAY_JOB_NAME = 47  # KubeRay appends 6 characters for the cluster, and up to 10 for that one's services
LABEL = 63
ANNOTATIONS_BYTES = 256 << 10

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_QUANTITY = re.compile(r"(\d+|\d+\.\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_IMAGE = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:\d+)?/)?[a-z0-9]+(([._/]|__|-+)[a-z0-9]+)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_SUFFIXES = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}


def is_dns_1035(text: str) -> bool:
    """Whether it can name a JobSet, a TrainJob or a RayJob, and so a Service."""
    return len(text) <= LABEL and bool(_DNS_1035.fullmatch(text))


def is_dns_1123(text: str) -> bool:
    """Whether it can name a namespace."""
    return len(text) <= LABEL and bool(_DNS_1123.fullmatch(text))


def is_subdomain(text: str) -> bool:
    """Whether it can name a Secret, a claim, a service account and most other objects."""
    return len(text) <= 253 and bool(_SUBDOMAIN.fullmatch(text))


def is_label_value(text: str) -> bool:
    return len(text) <= LABEL and (text == "" or bool(_WORD.fullmatch(text)))


def is_qualified(text: str) -> bool:
    """Whether it can be the key of a label or an annotation, as `team` or `example.com/team`."""
    prefix, slash, name = text.rpartition("/")
    return (not slash or is_subdomain(prefix)) and len(name) <= LABEL and bool(_WORD.fullmatch(name))


def is_image(text: str) -> bool:
    return bool(_IMAGE.fullmatch(text))


def quantity(text: str) -> Decimal | None:
    """The number that a quantity stands for, as 2 for `2000m`; None if it is none."""
    if not (match := _QUANTITY.fullmatch(text)):
        return None
    number, suffix = Decimal(match[1]), match[2] or ""
    if suffix in _BINARY:
        return number * 1024 ** _BINARY[suffix]
    return number * Decimal(10) ** (_SUFFIXES[suffix] if suffix in _SUFFIXES else int(suffix[1:] or 0))


def longest_pod_name(name: str, replicated_job: str, pods: int) -> str:
    """The longest name of a JobSet's pods; the five letters at its end are the Job controller's."""
    return f"{name}-{replicated_job}-0-{pods - 1}-abcde"


def broken(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Every rule that an object breaks whose fields its model has accepted, as `metadata.name: ...`."""
    kind, metadata = manifest["kind"], manifest["metadata"]
    yield from _metadata(metadata, "metadata")
    if kind != "ConfigMap" and not is_dns_1035(metadata["name"]):
        yield f"metadata.name: {metadata['name']!r} is no DNS-1035 name (a letter, then a-z, 0-9 and -, at most 63)"
    yield from {"ConfigMap": _config_map, "JobSet": _job_set, "TrainJob": _train_job, "RayJob": _ray_job}[kind](
        manifest
    )
    if kind != "ConfigMap":
        yield from _queue(manifest)


def _metadata(metadata: Mapping[str, Any], where: str) -> Iterator[str]:
    if "name" in metadata and not is_subdomain(metadata["name"]):
        yield f"{where}.name: {metadata['name']!r} is no DNS-1123 name"
    if "namespace" in metadata and not is_dns_1123(metadata["namespace"]):
        yield f"{where}.namespace: {metadata['namespace']!r} is no DNS-1123 label"
    for key, value in metadata.get("labels", {}).items():
        if not is_qualified(key):
            yield f"{where}.labels: {key!r} is no label key"
        if not is_label_value(value):
            yield f"{where}.labels.{key}: {value!r} is no label value (letters, digits, - _ . and at most 63)"
    annotations = metadata.get("annotations", {})
    for key in annotations:
        if not is_qualified(key):
            yield f"{where}.annotations: {key!r} is no annotation key"
    if (size := sum(len(key) + len(value) for key, value in annotations.items())) > ANNOTATIONS_BYTES:
        yield f"{where}.annotations: {size} bytes, at most {ANNOTATIONS_BYTES}"


def _config_map(manifest: Mapping[str, Any]) -> Iterator[str]:
    if (size := sum(len(text.encode()) for text in manifest["data"].values())) > CONFIG_MAP_BYTES:
        yield f"data: {size} bytes, at most {CONFIG_MAP_BYTES}"


def _queue(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What Kueue asks of a job that has a queue's label."""
    spec, queued = manifest["spec"], QUEUE in manifest["metadata"].get("labels", {})
    if queued and not spec.get("suspend"):
        yield f"spec.suspend: must be true with the label {QUEUE}, or the job starts before Kueue has admitted it"
    if queued and manifest["kind"] == "RayJob" and not spec["shutdownAfterJobFinishes"]:
        yield f"spec.shutdownAfterJobFinishes: must be true with the label {QUEUE}"
    if not queued and any(key in str(spec) for key in TOPOLOGY):
        yield f"metadata.labels: {QUEUE} is missing, and Kueue alone reads a topology annotation"


def _job_set(manifest: Mapping[str, Any]) -> Iterator[str]:
    spec = manifest["spec"]
    if not is_dns_1035(spec["network"]["subdomain"]):
        yield f"spec.network.subdomain: {spec['network']['subdomain']!r} is no DNS-1035 name"
    yield from _seconds(spec, "ttlSecondsAfterFinished", "spec", least=0)
    if spec["failurePolicy"]["maxRestarts"] < 0:
        yield "spec.failurePolicy.maxRestarts: at least 0"
    names = [rule["name"] for rule in spec["failurePolicy"]["rules"]]
    if len(set(names)) < len(names):
        yield "spec.failurePolicy.rules: two of the same name"
    for i, job in enumerate(spec["replicatedJobs"]):
        where, inner = f"spec.replicatedJobs[{i}]", job["template"]["spec"]
        name = longest_pod_name(manifest["metadata"]["name"], job["name"], inner["completions"])
        if not is_dns_1035(name):
            yield f"metadata.name: pods would be called {name!r}, {len(name)} characters, at most {LABEL}"
        if inner["completions"] != inner["parallelism"] or inner["completions"] < 1:
            yield f"{where}.template.spec: completions and parallelism must be the same and at least 1"
        yield from _seconds(inner, "activeDeadlineSeconds", f"{where}.template.spec", least=1)
        pod = inner["template"]["spec"]
        if pod.get("restartPolicy") != "Never":
            yield f"{where}.template.spec.template.spec.restartPolicy: must be Never with a podFailurePolicy"
        containers = [container["name"] for container in pod["containers"]]
        for rule in inner["podFailurePolicy"]["rules"]:
            if ("onExitCodes" in rule) == ("onPodConditions" in rule):
                yield f"{where}.template.spec.podFailurePolicy: each rule has onExitCodes or onPodConditions, not both"
            codes = rule.get("onExitCodes", {})
            if codes and codes["containerName"] not in containers:
                yield f"{where}.template.spec.podFailurePolicy: no container {codes['containerName']!r}"
            if codes and (0 in codes["values"] or codes["values"] != sorted(set(codes["values"]))):
                yield f"{where}.template.spec.podFailurePolicy: exit codes are sorted, without 0 or repetition"
        yield from _pod_template(inner["template"], f"{where}.template.spec.template")


def _train_job(manifest: Mapping[str, Any]) -> Iterator[str]:
    spec = manifest["spec"]
    trainer = spec["trainer"]
    yield from _seconds(spec, "activeDeadlineSeconds", "spec", least=1)
    for key in ("numNodes", "numProcPerNode"):
        yield from _seconds(trainer, key, "spec.trainer", least=1)
    if reserved := [e["name"] for e in trainer["env"] if e["name"].startswith("PET_")]:
        yield f"spec.trainer.env: {', '.join(reserved)} is set by the operator"
    yield from _env(trainer["env"], "spec.trainer.env")
    yield from _quantities(trainer.get("resourcesPerNode", {}), "spec.trainer.resourcesPerNode")
    managers = [patch["manager"] for patch in spec["runtimePatches"]]
    if len(set(managers)) < len(managers) or not all("/" in manager and is_qualified(manager) for manager in managers):
        yield "spec.runtimePatches: each has its own manager, as domain/name"
    for patch in spec["runtimePatches"]:
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            name = longest_pod_name(manifest["metadata"]["name"], job["name"], trainer["numNodes"])
            if not is_dns_1035(name):
                yield f"metadata.name: pods would be called {name!r}, {len(name)} characters, at most {LABEL}"
            yield from _pod_template(job["template"]["spec"]["template"], f"spec.runtimePatches, job {job['name']}")


def _ray_job(manifest: Mapping[str, Any]) -> Iterator[str]:
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    if len(name) > RAY_JOB_NAME:
        yield f"metadata.name: {name!r} has {len(name)} characters, at most {RAY_JOB_NAME} for a RayJob"
    if "ttlSecondsAfterFinished" in spec and not spec["shutdownAfterJobFinishes"]:
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not spec["shutdownAfterJobFinishes"]:
        yield "spec.suspend: needs shutdownAfterJobFinishes"
    yield from _seconds(spec, "ttlSecondsAfterFinished", "spec", least=0)
    yield from _seconds(spec, "activeDeadlineSeconds", "spec", least=1)
    yield from _seconds(spec, "backoffLimit", "spec", least=0)
    yield from _seconds(spec["submitterConfig"], "backoffLimit", "spec.submitterConfig", least=0)
    if spec["submissionMode"] == "SidecarMode":
        yield "spec.submitterConfig: not with SidecarMode"
    if any(mark in spec["entrypoint"] for mark in (";", "&", "|", "\n")):
        yield "spec.entrypoint: one command; what follows ; & or | would run in the submitter's pod"
    cluster = spec["rayClusterSpec"]
    yield from _pod_template(cluster["headGroupSpec"]["template"], "spec.rayClusterSpec.headGroupSpec.template")
    for i, group in enumerate(cluster["workerGroupSpecs"]):
        where = f"spec.rayClusterSpec.workerGroupSpecs[{i}]"
        if not is_dns_1035(group["groupName"]):
            yield f"{where}.groupName: {group['groupName']!r} is no DNS-1035 name"
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{where}: expected 0 <= minReplicas <= replicas <= maxReplicas"
        if "labels" in group["rayStartParams"]:
            yield f"{where}.rayStartParams: labels are not taken there"
        yield from _pod_template(group["template"], f"{where}.template")


def _pod_template(template: Mapping[str, Any], where: str) -> Iterator[str]:
    """A pod's template, or a patch of one."""
    yield from _metadata(template.get("metadata", {}), f"{where}.metadata")
    pod = template["spec"]
    if pod["terminationGracePeriodSeconds"] < 1:
        yield f"{where}.spec.terminationGracePeriodSeconds: at least 1"
    volumes = [volume["name"] for volume in pod["volumes"]]
    for name in _twice(volumes):
        yield f"{where}.spec.volumes: two are called {name!r}"
    for volume in pod["volumes"]:
        if len(volume) != 2 or not is_dns_1123(volume["name"]):
            yield f"{where}.spec.volumes: {volume['name']!r} must be a DNS-1123 label with one source"
        yield from _quantities(
            {"emptyDir": {k: v for k, v in volume.get("emptyDir", {}).items() if k == "sizeLimit"}}, where
        )
    for i, toleration in enumerate(pod.get("tolerations", [])):
        if complaint := toleration_complaint(toleration):
            yield f"{where}.spec.tolerations[{i}]: {complaint}"
    for key, value in pod.get("nodeSelector", {}).items():
        if not is_qualified(key) or not is_label_value(value):
            yield f"{where}.spec.nodeSelector: {key}: {value} is no label"
    for container in pod["containers"]:
        inside = f"{where}.spec.containers, {container['name']}"
        yield from _env(container.get("env", []), f"{inside}.env")
        yield from _quantities(container.get("resources", {}), f"{inside}.resources")
        if "image" in container and not is_image(container["image"]):
            yield f"{inside}.image: {container['image']!r} is no image reference"
        mounts = container["volumeMounts"]
        for name in _twice(mount["mountPath"] for mount in mounts):
            yield f"{inside}.volumeMounts: two at {name}"
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"{inside}.volumeMounts: no volume {mount['name']!r}"
            if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
                yield f"{inside}.volumeMounts: {mount['mountPath']!r} is no absolute path"


def toleration_complaint(toleration: Mapping[str, Any]) -> str:
    """Which rule of tolerations one breaks whose fields are right; empty if none."""
    operator = toleration.get("operator", "Equal")
    if "key" in toleration and not is_qualified(toleration["key"]):
        return f"{toleration['key']!r} is no key of a taint"
    if "key" not in toleration and operator != "Exists":
        return "without a key, operator must be Exists"
    if operator == "Exists" and toleration.get("value"):
        return "operator Exists takes no value"
    if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
        return "tolerationSeconds needs effect NoExecute"
    return "" if is_label_value(toleration.get("value", "")) else f"{toleration['value']!r} is no value of a taint"


def _env(env: Iterable[Mapping[str, Any]], where: str) -> Iterator[str]:
    for variable in env:
        sources = [*(["value"] if "value" in variable else []), *variable.get("valueFrom", {})]
        if len(sources) != 1:
            yield f"{where}.{variable['name']}: expected one value or source, got {len(sources)}"
    for name in _twice(variable["name"] for variable in env):
        yield f"{where}: {name} is set twice"


def _quantities(groups: Mapping[str, Mapping[str, str]], where: str) -> Iterator[str]:
    """Malformed quantities, and requests above their limits."""
    for group, values in groups.items():
        for name, text in values.items():
            if quantity(text) is None:
                yield f"{where}.{group}.{name}: {text!r} is no quantity"
    limits, requests = groups.get("limits", {}), groups.get("requests", {})
    for name in limits.keys() & requests.keys():
        asked, most = quantity(requests[name]), quantity(limits[name])
        if asked is not None and most is not None and asked > most:
            yield f"{where}.requests.{name}: {requests[name]} is above its limit {limits[name]}"


def _seconds(values: Mapping[str, Any], key: str, where: str, *, least: int) -> Iterator[str]:
    if key in values and values[key] < least:
        yield f"{where}.{key}: {values[key]}, at least {least}"


def _twice(names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)
