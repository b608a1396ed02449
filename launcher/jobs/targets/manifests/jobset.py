"""JobSet (jobset.x-k8s.io/v1alpha2): one Indexed Job whose pods are the nodes, restarted as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.jobs.targets.manifests.pod import ObjectMeta, PodTemplate
from launcher.jobs.targets.manifests.strict import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCodes(Model):
    containerName: str
    operator: Literal["In", "NotIn"]
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodCondition(Model):
    type: str
    status: Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFailureRule(Model):
    action: Literal["FailJob", "Count", "Ignore"]
    onExitCodes: ExitCodes | None = None
    onPodConditions: tuple[PodCondition, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFailurePolicy(Model):
    rules: tuple[PodFailureRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec(Model):
    completionMode: Literal["Indexed"] = "Indexed"
    completions: int
    parallelism: int
    backoffLimit: int
    activeDeadlineSeconds: int | None = None
    podFailurePolicy: PodFailurePolicy
    template: PodTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTemplate(Model):
    spec: JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedJob(Model):
    name: str
    replicas: int
    template: JobTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRule(Model):
    name: str
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: tuple[
        Literal[
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"
        ],
        ...,
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy(Model):
    maxRestarts: int
    restartStrategy: Literal["Recreate", "BlockingRecreate"]
    rules: tuple[FailureRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessPolicy(Model):
    operator: Literal["All", "Any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Model):
    enableDNSHostnames: bool
    publishNotReadyAddresses: bool
    subdomain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSetSpec(Model):
    suspend: bool | None = None
    ttlSecondsAfterFinished: int | None = None
    network: Network
    successPolicy: SuccessPolicy
    failurePolicy: FailurePolicy
    replicatedJobs: tuple[ReplicatedJob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSet(Model):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"] = "jobset.x-k8s.io/v1alpha2"
    kind: Literal["JobSet"] = "JobSet"
    metadata: ObjectMeta
    spec: JobSetSpec
