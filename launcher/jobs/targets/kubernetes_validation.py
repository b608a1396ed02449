"""What is wrong with a rendered manifest, in three layers: our models and rules, kubernetes-validate, the CRDs."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.jobs.job import Finding
from launcher.jobs.targets.kubernetes_jobs import MODELS
from launcher.jobs.targets.manifests import rules
from launcher.jobs.targets.manifests.strict import complaints

CRD_DIR = "LAUNCHER_CRD_DIR"  # folder with CustomResourceDefinitions as YAML; `launcher render --crds` sets it
FILES = {  # as controller-gen calls them
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
}
_MODELS, _PODS, _CRDS = "manifest (models and operators' rules)", "pod template (kubernetes-validate)", "job (CRD)"


def findings(text: str) -> Iterator[Finding]:
    """One a layer where it has nothing against the manifest, else one a complaint."""
    manifests = read(text)
    yield from _layer(_MODELS, [c for manifest in manifests for c in model_complaints(manifest)])
    if importlib.util.find_spec("kubernetes_validate") is None:
        yield Finding(_PODS, "skipped", "pip install kubernetes-validate")
    else:
        yield from _layer(_PODS, [c for manifest in manifests for c in pod_complaints(manifest)])
    yield from _crds(manifests)


def read(text: str) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    import yaml

    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def model_complaints(manifest: Mapping[str, Any]) -> list[str]:
    """Unknown and mistyped fields; where there are none, the rules that are broken."""
    kind = manifest.get("kind", "")
    if kind not in MODELS:
        return [f"kind: {kind!r} is none of {', '.join(MODELS)}"]
    said = list(complaints(MODELS[kind], manifest, "")) or list(rules.broken(manifest))
    return [f"{kind}: {complaint}" for complaint in said]


def pod_complaints(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What Kubernetes' own schemas say of the parts that are Kubernetes' own; unknown fields are refused."""
    import kubernetes_validate

    for where, part in _own_parts(manifest):
        try:
            kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{manifest['kind']}: {'.'.join([where, *map(str, error.path)])}: {error.message}"


def _own_parts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each lies, and the part as an object of its own."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "ConfigMap":
        yield "ConfigMap", dict(manifest)
    elif manifest["kind"] == "JobSet":
        for job in spec["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            yield f"replicated job {job['name']}", whole
    elif manifest["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            name = group.get("groupName", "head")
            yield f"group {name}", {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}
    else:
        yield "pod", _patched_pod(manifest)


def _patched_pod(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that a TrainJob makes of a runtime's bare one."""
    trainer = manifest["spec"]["trainer"]
    pod: dict[str, Any] = {"containers": [{"name": "node"}]}
    for patch in manifest["spec"]["runtimePatches"]:
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            given = job["template"]["spec"]["template"]["spec"]
            pod = {**pod, **given, "containers": [{**pod["containers"][0], **given["containers"][0]}]}
    pod["containers"][0] |= {"image": trainer["image"], "command": trainer["command"], "env": trainer["env"]}
    if "resourcesPerNode" in trainer:
        pod["containers"][0]["resources"] = trainer["resourcesPerNode"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod}


def _crds(manifests: list[dict[str, Any]]) -> Iterator[Finding]:
    folder = os.environ.get(CRD_DIR)
    if not folder:
        yield Finding(_CRDS, "skipped", f"no CRDs given (--crds DIR, or {CRD_DIR})")
        return
    if not Path(folder).is_dir():
        raise UserError(f"--crds {folder}: expected a folder with CustomResourceDefinitions ({CRD_DIR}).")
    if importlib.util.find_spec("jsonschema") is None:
        yield Finding(_CRDS, "skipped", "pip install jsonschema")
        return
    for manifest in manifests:
        if manifest["kind"] in FILES:
            file = Path(folder, FILES[manifest["kind"]])
            if file.is_file():
                yield from _layer(_CRDS, list(crd_complaints(manifest, file)))
            else:
                yield Finding(_CRDS, "skipped", f"{file} is not there")


def crd_complaints(manifest: Mapping[str, Any], file: Path) -> Iterator[str]:
    """What a CRD's schema says of an object; fields that it does not know, which a server would drop, are refused."""
    version = manifest["apiVersion"].rpartition("/")[2]
    validators = _validators(file, file.stat().st_mtime_ns)
    if version not in validators:
        yield f"apiVersion: {file.name} serves {', '.join(validators)}, not {version}"
        return
    for error in sorted(validators[version].iter_errors(manifest), key=lambda error: str(error.path)):
        yield f"{'.'.join(map(str, error.path)) or manifest['kind']}: {error.message}"


@functools.lru_cache(maxsize=8)
def _validators(file: Path, changed: int) -> dict[str, Any]:
    """Version to validator, for the versions that are served. changed: when the file was, so that it is read again."""
    import jsonschema
    import yaml

    crd = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    served = [version for version in crd["spec"]["versions"] if version["served"]]
    return {v["name"]: jsonschema.Draft7Validator(strict(v["schema"]["openAPIV3Schema"])) for v in served}


def strict(schema: Any) -> Any:
    """A structural schema that refuses unknown fields, and takes what Kubernetes calls int-or-string."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    closed = {
        key: strict(value) if key not in ("default", "enum", "example") else value for key, value in schema.items()
    }
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _layer(what: str, said: list[str]) -> Iterator[Finding]:
    if not said:
        yield Finding(what, "ok")
    for complaint in said:
        yield Finding(what, "bad", complaint)
