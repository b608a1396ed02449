"""What every kind of job shares: metadata, the ConfigMap with the recipe, and the template of a pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.jobs.targets.manifests.strict import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMeta(Model):
    name: str | None = None
    namespace: str | None = None
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMap(Model):
    apiVersion: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: ObjectMeta
    immutable: bool = True
    data: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretKeyRef(Model):
    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRef(Model):
    fieldPath: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSource(Model):
    secretKeyRef: SecretKeyRef | None = None
    fieldRef: FieldRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvVar(Model):
    name: str
    value: str | None = None
    valueFrom: EnvSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources(Model):
    requests: Mapping[str, str] | None = None
    limits: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMount(Model):
    name: str
    mountPath: str
    readOnly: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exec(Model):
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler(Model):
    exec: Exec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle(Model):
    preStop: Handler


@dataclass(frozen=True, slots=True, kw_only=True)
class Container(Model):
    name: str
    image: str
    command: tuple[str, ...] | None = None
    env: tuple[EnvVar, ...]
    resources: Resources | None = None
    lifecycle: Lifecycle | None = None
    volumeMounts: tuple[VolumeMount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Model):
    claimName: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMapSource(Model):
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyDir(Model):
    medium: Literal["Memory"]
    sizeLimit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume(Model):
    name: str
    persistentVolumeClaim: Claim | None = None
    configMap: ConfigMapSource | None = None
    emptyDir: EmptyDir | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Toleration(Model):
    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretName(Model):
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpec(Model):
    restartPolicy: Literal["Never"] | None = None  # None: the operator's own choice
    terminationGracePeriodSeconds: int
    serviceAccountName: str | None = None
    imagePullSecrets: tuple[SecretName, ...] | None = None
    priorityClassName: str | None = None
    nodeSelector: Mapping[str, str] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate(Model):
    metadata: ObjectMeta | None = None
    spec: PodSpec
