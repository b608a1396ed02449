"""RayJob (ray.io/v1): a Ray cluster of its own, a head that trains nothing, and the driver that is run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.jobs.targets.manifests.pod import ObjectMeta, PodTemplate
from launcher.jobs.targets.manifests.strict import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup(Model):
    rayStartParams: Mapping[str, str]
    template: PodTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup(Model):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: Mapping[str, str]
    template: PodTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class RayClusterSpec(Model):
    rayVersion: str | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: tuple[WorkerGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitterConfig(Model):
    backoffLimit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJobSpec(Model):
    suspend: bool | None = None
    entrypoint: str
    runtimeEnvYAML: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]  # the CRD has no enum here
    submitterConfig: SubmitterConfig
    backoffLimit: int
    activeDeadlineSeconds: int | None = None
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int | None = None
    rayClusterSpec: RayClusterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJob(Model):
    apiVersion: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: ObjectMeta
    spec: RayJobSpec
