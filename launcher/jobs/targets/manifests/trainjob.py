"""TrainJob (trainer.kubeflow.org/v1alpha1): what the runtime of that name starts, and what its pods have besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.jobs.targets.manifests.pod import (
    EnvVar,
    ObjectMeta,
    Resources,
    SecretName,
    Toleration,
    Volume,
    VolumeMount,
)
from launcher.jobs.targets.manifests.strict import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeRef(Model):
    apiGroup: Literal["trainer.kubeflow.org"] = "trainer.kubeflow.org"
    kind: Literal["ClusterTrainingRuntime"] = "ClusterTrainingRuntime"
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer(Model):
    image: str
    command: tuple[str, ...]
    env: tuple[EnvVar, ...]
    numNodes: int
    numProcPerNode: int
    resourcesPerNode: Resources | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPatch(Model):
    name: str
    volumeMounts: tuple[VolumeMount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPatch(Model):
    terminationGracePeriodSeconds: int
    serviceAccountName: str | None = None
    imagePullSecrets: tuple[SecretName, ...] | None = None
    nodeSelector: Mapping[str, str] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    containers: tuple[ContainerPatch, ...]
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplatePatch(Model):
    metadata: ObjectMeta | None = None
    spec: PodPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpecPatch(Model):
    template: PodTemplatePatch


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPatch(Model):
    spec: JobSpecPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedJobPatch(Model):
    name: str
    template: JobPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSetSpecPatch(Model):
    replicatedJobs: tuple[ReplicatedJobPatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSetPatch(Model):
    spec: JobSetSpecPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSpecPatch(Model):
    template: JobSetPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePatch(Model):
    manager: str
    trainingRuntimeSpec: RuntimeSpecPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJobSpec(Model):
    suspend: bool | None = None
    activeDeadlineSeconds: int | None = None
    runtimeRef: RuntimeRef
    trainer: Trainer
    runtimePatches: tuple[RuntimePatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob(Model):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"] = "trainer.kubeflow.org/v1alpha1"
    kind: Literal["TrainJob"] = "TrainJob"
    metadata: ObjectMeta
    spec: TrainJobSpec
