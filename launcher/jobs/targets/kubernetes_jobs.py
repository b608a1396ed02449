"""A job spec as models: the ConfigMap with the recipe, and the job of cluster.kubernetes.kind."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping

from launcher.errors import EXIT_FAILED, EXIT_USER_ERROR
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets import kubernetes_parts as parts
from launcher.jobs.targets.manifests import rules
from launcher.jobs.targets.manifests.jobset import (
    ExitCodes,
    FailurePolicy,
    FailureRule,
    JobSet,
    JobSetSpec,
    JobTemplate,
    Network,
    PodCondition,
    PodFailurePolicy,
    PodFailureRule,
    ReplicatedJob,
    SuccessPolicy,
)
from launcher.jobs.targets.manifests.jobset import JobSpec as IndexedJob
from launcher.jobs.targets.manifests.pod import ConfigMap, EnvVar, ObjectMeta, PodTemplate, Resources
from launcher.jobs.targets.manifests.rayjob import (
    HeadGroup,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    SubmitterConfig,
    WorkerGroup,
)
from launcher.jobs.targets.manifests.strict import Model
from launcher.jobs.targets.manifests.trainjob import (
    ContainerPatch,
    JobPatch,
    JobSetPatch,
    JobSetSpecPatch,
    JobSpecPatch,
    PodPatch,
    PodTemplatePatch,
    ReplicatedJobPatch,
    RuntimePatch,
    RuntimeRef,
    RuntimeSpecPatch,
    Trainer,
    TrainJob,
    TrainJobSpec,
)

MAX_RESTARTS = 1000  # the worker's own budgets end a job long before (cluster.restart)
_HEAD = {"cpu": "2", "memory": "8Gi"}
_HEAD_SHM = "4Gi"  # above the 30 % of its memory that Ray takes for its object store
MODELS: Mapping[str, type[Model]] = {"ConfigMap": ConfigMap, "JobSet": JobSet, "TrainJob": TrainJob, "RayJob": RayJob}


def objects(spec: JobSpec) -> tuple[ConfigMap, JobSet | TrainJob | RayJob]:
    """What is created, in this order."""
    kinds: dict[str, Callable[[JobSpec], JobSet | TrainJob | RayJob]]
    kinds = {"jobset": _job_set, "trainjob": _train_job, "rayjob": _ray_job}
    kind = kinds[spec.cluster.kubernetes.kind]
    name, namespace = parts.job_name(spec), spec.cluster.kubernetes.namespace
    meta = ObjectMeta(name=name, namespace=namespace, labels={"app.kubernetes.io/managed-by": "launcher"})
    return ConfigMap(metadata=meta, data={"recipe.yaml": spec.files.get("recipe.yaml", "")}), kind(spec)


# the three kinds


def _job_set(spec: JobSpec) -> JobSet:
    k8s, name = spec.cluster.kubernetes, parts.job_name(spec)
    job = IndexedJob(
        completions=spec.nodes,
        parallelism=spec.nodes,
        backoffLimit=0,  # one node's end is every node's: the JobSet starts all of them again
        activeDeadlineSeconds=parts.deadline_s(spec),
        podFailurePolicy=PodFailurePolicy(
            rules=(
                PodFailureRule(action="Count", onPodConditions=(PodCondition(type="DisruptionTarget", status="True"),)),
                PodFailureRule(
                    action="FailJob",
                    onExitCodes=ExitCodes(
                        containerName=parts.NODE, operator="In", values=(EXIT_FAILED, EXIT_USER_ERROR)
                    ),
                ),
            )
        ),
        template=_node_template(
            spec, env=(*parts.job_env(spec), *parts.place_env(spec)), command=parts.worker_command(spec)
        ),
    )
    return JobSet(
        metadata=parts.metadata(k8s, name),
        spec=JobSetSpec(
            suspend=parts.suspend(k8s),
            ttlSecondsAfterFinished=k8s.ttl_s,
            network=Network(enableDNSHostnames=True, publishNotReadyAddresses=True, subdomain=name),
            successPolicy=SuccessPolicy(operator="All"),
            failurePolicy=FailurePolicy(
                maxRestarts=MAX_RESTARTS,
                restartStrategy="Recreate",
                rules=(
                    FailureRule(
                        name="stopped_for_good", action="FailJobSet", onJobFailureReasons=("PodFailurePolicy",)
                    ),
                ),
            ),
            replicatedJobs=(ReplicatedJob(name=parts.NODE, replicas=1, template=JobTemplate(spec=job)),),
        ),
    )


def _train_job(spec: JobSpec) -> TrainJob:
    k8s = spec.cluster.kubernetes
    pod = PodPatch(
        terminationGracePeriodSeconds=parts.grace_s(spec),
        serviceAccountName=k8s.service_account,
        imagePullSecrets=parts.pull_secrets(k8s),
        nodeSelector=k8s.node_selector or None,
        tolerations=parts.tolerations(k8s),
        containers=(ContainerPatch(name=parts.NODE, volumeMounts=parts.mounts(k8s)),),
        volumes=parts.volumes(k8s, parts.job_name(spec)),
    )
    template = PodTemplatePatch(metadata=parts.topology(k8s), spec=pod)
    patch = JobSetPatch(
        spec=JobSetSpecPatch(
            replicatedJobs=(
                ReplicatedJobPatch(name=parts.NODE, template=JobPatch(spec=JobSpecPatch(template=template))),
            )
        )
    )
    return TrainJob(
        metadata=parts.metadata(k8s, parts.job_name(spec)),
        spec=TrainJobSpec(
            suspend=parts.suspend(k8s),
            activeDeadlineSeconds=parts.deadline_s(spec),
            runtimeRef=RuntimeRef(name=k8s.runtime),
            trainer=Trainer(
                image=parts.image(k8s),
                command=parts.worker_command(spec),
                env=parts.job_env(spec),
                numNodes=spec.nodes,
                numProcPerNode=spec.nproc_per_node,
                resourcesPerNode=parts.resources(spec),
            ),
            runtimePatches=(
                RuntimePatch(manager="train-launcher/launcher", trainingRuntimeSpec=RuntimeSpecPatch(template=patch)),
            ),
        ),
    )


def _ray_job(spec: JobSpec) -> RayJob:
    k8s, name = spec.cluster.kubernetes, parts.job_name(spec)
    stop = EnvVar(name="RAY_JOB_STOP_WAIT_TIME_S", value=str(spec.stop_lead_s))  # Ray's own grace is 3 s
    job = EnvVar(name="LAUNCHER_JOB_ID", value=name)
    common = parts.common_env(spec)
    entrypoint = ["python", "-m", "launcher.jobs.ray_driver", spec.run, "--recipe", parts.RECIPE]
    ray = spec.cluster.ray
    cpus = max(ray.cpus_per_node or spec.nproc_per_node, _whole(k8s.cpus))
    start = {"num-cpus": str(cpus)} | ({"num-gpus": str(spec.nproc_per_node)} if parts.on_gpus(spec) else {})
    head = parts.template(
        spec,
        name="ray-head",
        env=(job, stop, *common),
        resources=Resources(requests=_HEAD, limits={"memory": _HEAD["memory"]}),
        shm=_HEAD_SHM,
    )
    return RayJob(
        metadata=parts.metadata(k8s, name),
        spec=RayJobSpec(
            suspend=parts.suspend(k8s),
            entrypoint=shlex.join(entrypoint),
            runtimeEnvYAML=json.dumps({"pip": ray.pip}) if ray.pip else None,
            submissionMode="K8sJobMode",
            submitterConfig=SubmitterConfig(backoffLimit=2),
            backoffLimit=0,  # the driver itself goes on after a lost node; KubeRay would repeat a user's mistake too
            activeDeadlineSeconds=parts.deadline_s(spec),
            shutdownAfterJobFinishes=True,
            ttlSecondsAfterFinished=k8s.ttl_s,
            rayClusterSpec=RayClusterSpec(
                rayVersion=k8s.ray_version,
                headGroupSpec=HeadGroup(
                    rayStartParams={"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"}, template=head
                ),
                workerGroupSpecs=(
                    WorkerGroup(
                        groupName="nodes",
                        replicas=spec.nodes,
                        minReplicas=spec.nodes,
                        maxReplicas=spec.nodes,
                        rayStartParams=start,
                        template=parts.template(
                            spec,
                            name="ray-worker",
                            env=common,
                            resources=parts.resources(spec),
                            metadata=parts.topology(k8s),
                        ),
                    ),
                ),
            ),
        ),
    )


def _node_template(spec: JobSpec, *, env: tuple[EnvVar, ...], command: tuple[str, ...]) -> PodTemplate:
    metadata = parts.topology(spec.cluster.kubernetes)
    return parts.template(
        spec, name=parts.NODE, env=env, command=command, resources=parts.resources(spec), metadata=metadata
    )


def _whole(cpus: str | None) -> int:
    """Cores, rounded down, as Ray counts them."""
    return math.floor(rules.quantity(cpus) or 0) if cpus else 0
