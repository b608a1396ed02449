"""What of a recipe target `kubernetes` cannot do: what it needs, what fits its kind of job, how words are written."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

from launcher.errors import Problem
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets.kubernetes_parts import job_name, longest_run_name
from launcher.jobs.targets.manifests import rules
from launcher.jobs.targets.manifests.pod import Toleration
from launcher.jobs.targets.manifests.strict import complaints
from launcher.recipe.schema.kubernetes import Kubernetes

KEY = "cluster.kubernetes"
_PATH = re.compile(r"[A-Za-z0-9._/@+=,:-]+")  # neither a shell nor Kubernetes' $(NAME) reads anything into it
_TAKEN = ("/", "/dev", "/dev/shm", "/etc", "/etc/launcher", "/proc", "/sys", "/usr", "/bin", "/lib", "/opt", "/root")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def problems(spec: JobSpec) -> Iterator[Problem]:
    """Every one, from keys and values alone."""
    k8s = spec.cluster.kubernetes
    yield from _needed(spec, k8s)
    yield from _names(k8s)
    yield from _run(spec, k8s)
    yield from _sizes(k8s)
    yield from _labels(k8s)
    yield from _tolerations(k8s)
    yield from _together(spec, k8s)
    if k8s.kind == "rayjob":
        yield from _ray(spec)


def _needed(spec: JobSpec, k8s: Kubernetes) -> Iterator[Problem]:
    if k8s.image is None:
        fix = "docs/kubernetes.md has a Dockerfile."
        yield Problem(f"{KEY}.image", None, "a container image that holds launcher and its extras", fix)
    elif not rules.is_image(k8s.image):
        yield Problem(f"{KEY}.image", k8s.image, "an image reference, as ghcr.io/team/launcher:0.4.0")
    if k8s.claim is None:
        fix = "All pods share the run directory on it."
        yield Problem(f"{KEY}.claim", None, "the name of a ReadWriteMany PersistentVolumeClaim", fix)
    if spec.env_names and k8s.secret is None:
        names = ", ".join(spec.env_names)
        first = spec.env_names[0]
        fix = f"Make it by: kubectl create secret generic launcher-env --from-literal={first}=..."
        yield Problem(
            f"{KEY}.secret", None, f"the name of a Secret with the keys {names}, because cluster.env names them", fix
        )


def _names(k8s: Kubernetes) -> Iterator[Problem]:
    """Names of objects that are there already."""
    kinds: tuple[tuple[str, Callable[[str], bool], str], ...] = (
        ("namespace", rules.is_dns_1123, "letters a-z, digits and - (at most 63), as team-a"),
        ("claim", rules.is_subdomain, "a name of letters a-z, digits, - and ."),
        ("secret", rules.is_subdomain, "a name of letters a-z, digits, - and ."),
        ("service_account", rules.is_subdomain, "a name of letters a-z, digits, - and ."),
        ("priority_class", rules.is_subdomain, "a name of letters a-z, digits, - and ."),
        ("queue", rules.is_dns_1123, "the name of a LocalQueue: letters a-z, digits and - (at most 63)"),
        ("runtime", rules.is_subdomain, "the name of a ClusterTrainingRuntime: letters a-z, digits and -"),
        ("topology", rules.is_qualified, "a node label, as topology.kubernetes.io/zone"),
        ("gpu_resource", lambda text: "/" in text and rules.is_qualified(text), "a resource, as nvidia.com/gpu"),
        ("ray_version", lambda text: bool(_VERSION.fullmatch(text)), "a version, as 2.60.0"),
    )
    for key, fits, expected in kinds:
        value = getattr(k8s, key)
        if value is not None and not fits(value):
            yield Problem(f"{KEY}.{key}", value, expected)
    for i, name in enumerate(k8s.pull_secrets):
        if not rules.is_subdomain(name):
            yield Problem(f"{KEY}.pull_secrets.{i}", name, "the name of a Secret: letters a-z, digits, - and .")


def _run(spec: JobSpec, k8s: Kubernetes) -> Iterator[Problem]:
    """The run's name and place, and the folder that pods share."""
    limit, name = longest_run_name(spec), job_name(spec).rpartition("-")[0]
    if len(name) > limit:
        kind = {"jobset": "JobSet", "trainjob": "TrainJob", "rayjob": "RayJob"}[k8s.kind]
        expected = f"at most {limit} characters, since names are made from it (a {kind} of {spec.nodes} nodes)"
        yield Problem("run.name", spec.name, expected, f"Use run.name={name[:limit].rstrip('-')}.")
    mount = posixpath.normpath(k8s.mount)
    if not k8s.mount.startswith("/") or ".." in k8s.mount.split("/") or mount in _TAKEN or not _PATH.fullmatch(mount):
        expected = "an absolute path that hides nothing of the image"
        yield Problem(f"{KEY}.mount", k8s.mount, expected, "Use /shared.")
        return
    folder, _, _ = spec.run.rpartition("/")
    if not below(spec.run, mount):
        yield Problem(
            "run.dir", folder, f"a folder below {KEY}.mount = {k8s.mount}", f"Use run.dir={mount}/runs.",
            because=(f"{KEY}.mount",),
        )  # fmt: skip
    elif not _PATH.fullmatch(folder):
        yield Problem("run.dir", folder, "a path of letters, digits and . _ / @ + = , : - (letters of a-z)")
    elif not _PATH.fullmatch(spec.name):
        yield Problem("run.name", spec.name, "a name of letters, digits and . _ @ + = , : - (letters of a-z)")


def below(path: str, mount: str) -> bool:
    """Whether a path lies inside of the folder that pods share."""
    return posixpath.normpath(path).startswith(posixpath.normpath(mount).rstrip("/") + "/")


def _sizes(k8s: Kubernetes) -> Iterator[Problem]:
    numbers = {}
    for key, example in (("cpus", "16 or 500m"), ("memory", "512Gi"), ("shm", "16Gi")):
        value = getattr(k8s, key)
        if value is None:
            continue
        number = rules.quantity(value)
        if not number:
            yield Problem(f"{KEY}.{key}", value, f"a quantity above 0, as {example}")
        else:
            numbers[key] = number
    if "memory" in numbers and numbers["shm" if "shm" in numbers else "memory"] > numbers["memory"]:
        expected = f"at most {KEY}.memory = {k8s.memory}, of which /dev/shm is a part"
        yield Problem(f"{KEY}.shm", k8s.shm, expected, because=(f"{KEY}.memory",))


def _labels(k8s: Kubernetes) -> Iterator[Problem]:
    for key in ("labels", "node_selector"):
        for label, value in getattr(k8s, key).items():
            if not rules.is_qualified(label):
                yield Problem(
                    f"{KEY}.{key}", label, "a label key, as team or example.com/team (at most 63 after the /)"
                )
            elif not rules.is_label_value(value):
                yield Problem(
                    f"{KEY}.{key}.{label}", value, "at most 63 letters, digits, - _ . that begin and end with no sign"
                )
    for name in k8s.annotations:
        if not rules.is_qualified(name):
            yield Problem(f"{KEY}.annotations", name, "an annotation key, as example.com/note")
    own = [name for name in k8s.labels if name.startswith(("kueue.x-k8s.io/", "app.kubernetes.io/managed-by"))]
    for name in own:
        use = f"Use {KEY}.queue and {KEY}.priority_class." if name.startswith("kueue") else ""
        yield Problem(f"{KEY}.labels.{name}", k8s.labels[name], "no label that launcher sets itself", use)


def _tolerations(k8s: Kubernetes) -> Iterator[Problem]:
    for i, toleration in enumerate(k8s.tolerations):
        where = f"{KEY}.tolerations.{i}"
        said = list(complaints(Toleration, toleration, "")) or [rules.toleration_complaint(toleration)]
        for complaint in filter(None, said):
            expected = "keys key, operator, value, effect, tolerationSeconds as Kubernetes takes them"
            yield Problem(where, toleration, expected, f"{complaint.rstrip('.')}.")


def _together(spec: JobSpec, k8s: Kubernetes) -> Iterator[Problem]:
    if k8s.topology is not None and k8s.queue is None:
        expected = f"null without {KEY}.queue, because Kueue alone reads it"
        yield Problem(f"{KEY}.topology", k8s.topology, expected, f"Name a LocalQueue as {KEY}.queue.")
    if k8s.topology_required and k8s.topology is None:
        yield Problem(f"{KEY}.topology_required", True, f"false, or a node label as {KEY}.topology")
    defaults = Kubernetes()
    for kind, keys in (("trainjob", ("runtime",)), ("rayjob", ("ray_version",))):
        for key in keys:
            value = getattr(k8s, key)
            if k8s.kind != kind and value != getattr(defaults, key):
                yield Problem(
                    f"{KEY}.{key}", value, f"nothing, because {KEY}.kind is {k8s.kind}", f"Only {kind} reads it."
                )
    if k8s.kind == "trainjob":
        yield from _train_job(k8s)
    if spec.cluster.min_nodes is not None and k8s.kind != "rayjob":
        why = "Trainer makes exactly numNodes pods" if k8s.kind == "trainjob" else "a JobSet makes all its pods anew"
        expected = f"null with {KEY}.kind = {k8s.kind}: where a pod is lost, {why}"
        fix = f"Remove the key, or take {KEY}.kind=rayjob."
        yield Problem("cluster.min_nodes", spec.cluster.min_nodes, expected, fix, because=(f"{KEY}.kind",))
    if spec.cluster.snapshot:
        fix = "Build an image with the code, or keep the code below the mount."
        yield Problem("cluster.snapshot", True, f"false: pods run the code of {KEY}.image", fix)


def _train_job(k8s: Kubernetes) -> Iterator[Problem]:
    """What a TrainJob's patches cannot say; the runtime's own template could."""
    fix = f"Write it into the ClusterTrainingRuntime, or use {KEY}.kind=jobset."
    if k8s.ttl_s is not None:
        yield Problem(f"{KEY}.ttl_s", k8s.ttl_s, "null, because a TrainJob has no such field", fix)
    if k8s.priority_class is not None and k8s.queue is None:
        yield Problem(f"{KEY}.priority_class", k8s.priority_class, f"null without {KEY}.queue in a TrainJob", fix)


def _ray(spec: JobSpec) -> Iterator[Problem]:
    """Keys of cluster.ray that a cluster of the job's own leaves no room for."""
    ray = spec.cluster.ray
    empty: dict[str, tuple[Any, str]] = {
        "address": (None, "null: a RayJob has a cluster of its own"),
        "working_dir": (None, f"null: pods run the code of {KEY}.image"),
        "resources": ({}, "empty: a RayJob's workers are all the same"),
    }
    for key, (value, expected) in empty.items():
        if (given := getattr(ray, key)) != value:
            yield Problem(f"cluster.ray.{key}", given, expected)
