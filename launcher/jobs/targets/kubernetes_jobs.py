"""A job spec as models: the ConfigMap with the recipe, and the job of cluster.kubernetes.kind."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping

from launcher.errors import EXIT_FAILED, EXIT_USER_ERROR
from launcher.jobs.spec import JobSpec
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
from launcher.jobs.targets.manifests.pod import (
    Claim,
    ConfigMap,
    ConfigMapSource,
    Container,
    EmptyDir,
    EnvSource,
    EnvVar,
    Exec,
    FieldRef,
    Handler,
    Lifecycle,
    ObjectMeta,
    PodSpec,
    PodTemplate,
    Resources,
    SecretKeyRef,
    SecretName,
    Toleration,
    Volume,
    VolumeMount,
)
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
from launcher.recipe.schema.kubernetes import Kubernetes

NODE = "node"  # the replicated job of a JobSet and, by Kubeflow's convention, of a runtime; and the latter's container
PORT = 29400
RECIPE = "/etc/launcher/recipe.yaml"
GRACE_MARGIN_S = 60  # beside cluster.stop_lead_s, for the processes around the checkpoint to end
MAX_RESTARTS = 1000  # the worker's own budgets end a job long before (cluster.restart)
SUBMISSION_DIGITS = 3  # room in a job's name
_RESTART = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_HEAD = {"cpu": "2", "memory": "8Gi"}
_HEAD_SHM = "4Gi"  # above the 30 % of its memory that Ray takes for its object store


def job_name(spec: JobSpec) -> str:
    """The run's name as Kubernetes takes it, and the number of the submission, so that each is another object."""
    words = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    return f"{words if words[:1].isalpha() else f'run-{words}'.rstrip('-')}-{spec.submission}"


def longest_run_name(spec: JobSpec) -> int:
    """Characters that a run's name may have on its way through `job_name`."""
    suffix = 1 + SUBMISSION_DIGITS
    if spec.cluster.kubernetes.kind == "rayjob":
        return rules.RAY_JOB_NAME - suffix
    return rules.LABEL - len(rules.longest_pod_name("", NODE, spec.nodes)) - suffix


def objects(spec: JobSpec) -> tuple[ConfigMap, JobSet | TrainJob | RayJob]:
    """What is created, in this order."""
    kinds: dict[str, Callable[[JobSpec], JobSet | TrainJob | RayJob]]
    kinds = {"jobset": _job_set, "trainjob": _train_job, "rayjob": _ray_job}
    kind = kinds[spec.cluster.kubernetes.kind]
    name, namespace = job_name(spec), spec.cluster.kubernetes.namespace
    meta = ObjectMeta(name=name, namespace=namespace, labels={"app.kubernetes.io/managed-by": "launcher"})
    return ConfigMap(metadata=meta, data={"recipe.yaml": spec.files.get("recipe.yaml", "")}), kind(spec)


def grace_s(spec: JobSpec) -> int:
    """Seconds between SIGTERM and SIGKILL."""
    return spec.stop_lead_s + GRACE_MARGIN_S


def worker_command(spec: JobSpec) -> tuple[str, ...]:
    """The container's command, without a shell: the signal of a preemption reaches the worker itself."""
    return ("launcher", "worker", spec.run, "--recipe", RECIPE)


# the three kinds


def _job_set(spec: JobSpec) -> JobSet:
    k8s, name = spec.cluster.kubernetes, job_name(spec)
    job = IndexedJob(
        completions=spec.nodes,
        parallelism=spec.nodes,
        backoffLimit=0,  # one node's end is every node's: the JobSet starts all of them again
        activeDeadlineSeconds=_deadline_s(spec),
        podFailurePolicy=PodFailurePolicy(
            rules=(
                PodFailureRule(action="Count", onPodConditions=(PodCondition(type="DisruptionTarget", status="True"),)),
                PodFailureRule(
                    action="FailJob",
                    onExitCodes=ExitCodes(containerName=NODE, operator="In", values=(EXIT_FAILED, EXIT_USER_ERROR)),
                ),
            )
        ),
        template=_node_template(spec, env=(*_job_env(spec), *_place_env(spec)), command=worker_command(spec)),
    )
    return JobSet(
        metadata=_metadata(k8s, name),
        spec=JobSetSpec(
            suspend=_suspend(k8s),
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
            replicatedJobs=(ReplicatedJob(name=NODE, replicas=1, template=JobTemplate(spec=job)),),
        ),
    )


def _train_job(spec: JobSpec) -> TrainJob:
    k8s = spec.cluster.kubernetes
    pod = PodPatch(
        terminationGracePeriodSeconds=grace_s(spec),
        serviceAccountName=k8s.service_account,
        imagePullSecrets=_pull_secrets(k8s),
        nodeSelector=k8s.node_selector or None,
        tolerations=_tolerations(k8s),
        containers=(ContainerPatch(name=NODE, volumeMounts=_mounts(k8s)),),
        volumes=_volumes(k8s, job_name(spec)),
    )
    template = PodTemplatePatch(metadata=_topology(k8s), spec=pod)
    patch = JobSetPatch(
        spec=JobSetSpecPatch(
            replicatedJobs=(ReplicatedJobPatch(name=NODE, template=JobPatch(spec=JobSpecPatch(template=template))),)
        )
    )
    return TrainJob(
        metadata=_metadata(k8s, job_name(spec)),
        spec=TrainJobSpec(
            suspend=_suspend(k8s),
            activeDeadlineSeconds=_deadline_s(spec),
            runtimeRef=RuntimeRef(name=k8s.runtime),
            trainer=Trainer(
                image=_image(k8s),
                command=worker_command(spec),
                env=_job_env(spec),
                numNodes=spec.nodes,
                numProcPerNode=spec.nproc_per_node,
                resourcesPerNode=_resources(spec),
            ),
            runtimePatches=(
                RuntimePatch(manager="train-launcher/launcher", trainingRuntimeSpec=RuntimeSpecPatch(template=patch)),
            ),
        ),
    )


def _ray_job(spec: JobSpec) -> RayJob:
    k8s, name = spec.cluster.kubernetes, job_name(spec)
    stop = EnvVar(name="RAY_JOB_STOP_WAIT_TIME_S", value=str(spec.stop_lead_s))  # Ray's own grace is 3 s
    job = EnvVar(name="LAUNCHER_JOB_ID", value=name)
    common = _common_env(spec)
    entrypoint = ["python", "-m", "launcher.jobs.ray_driver", spec.run, "--recipe", RECIPE]
    ray = spec.cluster.ray
    cpus = max(ray.cpus_per_node or spec.nproc_per_node, _whole(k8s.cpus))
    start = {"num-cpus": str(cpus)} | ({"num-gpus": str(spec.nproc_per_node)} if _on_gpus(spec) else {})
    head = _template(
        spec,
        name="ray-head",
        env=(job, stop, *common),
        resources=Resources(requests=_HEAD, limits={"memory": _HEAD["memory"]}),
        shm=_HEAD_SHM,
    )
    return RayJob(
        metadata=_metadata(k8s, name),
        spec=RayJobSpec(
            suspend=_suspend(k8s),
            entrypoint=shlex.join(entrypoint),
            runtimeEnvYAML=json.dumps({"pip": ray.pip}) if ray.pip else None,
            submissionMode="K8sJobMode",
            submitterConfig=SubmitterConfig(backoffLimit=2),
            backoffLimit=0,  # the driver itself goes on after a lost node; KubeRay would repeat a user's mistake too
            activeDeadlineSeconds=_deadline_s(spec),
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
                        template=_template(
                            spec,
                            name="ray-worker",
                            env=common,
                            resources=_resources(spec),
                            metadata=_topology(k8s),
                        ),
                    ),
                ),
            ),
        ),
    )


# what they share


def _metadata(k8s: Kubernetes, name: str) -> ObjectMeta:
    labels = {"app.kubernetes.io/managed-by": "launcher", **k8s.labels}
    if k8s.queue is not None:
        labels[rules.QUEUE] = k8s.queue
        if k8s.priority_class is not None:
            labels["kueue.x-k8s.io/priority-class"] = k8s.priority_class
    return ObjectMeta(name=name, namespace=k8s.namespace, labels=labels, annotations=k8s.annotations or None)


def _suspend(k8s: Kubernetes) -> bool | None:
    """Kueue lets it go; said here too, so that a cluster without Kueue does not start it past the queue."""
    return True if k8s.queue is not None else None


def _deadline_s(spec: JobSpec) -> int | None:
    """When Kubernetes itself ends what has not asked itself to stop (cluster.stop_lead_s before)."""
    return None if spec.time_limit_min is None else spec.time_limit_min * 60


def _node_template(spec: JobSpec, *, env: tuple[EnvVar, ...], command: tuple[str, ...]) -> PodTemplate:
    metadata = _topology(spec.cluster.kubernetes)
    return _template(spec, name=NODE, env=env, command=command, resources=_resources(spec), metadata=metadata)


def _template(
    spec: JobSpec,
    *,
    name: str,
    env: tuple[EnvVar, ...],
    resources: Resources | None,
    command: tuple[str, ...] | None = None,
    metadata: ObjectMeta | None = None,
    shm: str | None = None,
) -> PodTemplate:
    k8s = spec.cluster.kubernetes
    container = Container(
        name=name,
        image=_image(k8s),
        command=command,
        env=env,
        resources=resources,
        lifecycle=_last_act(spec) if command is None else None,
        volumeMounts=_mounts(k8s),
    )
    return PodTemplate(
        metadata=metadata,
        spec=PodSpec(
            restartPolicy="Never",
            terminationGracePeriodSeconds=grace_s(spec),
            serviceAccountName=k8s.service_account,
            imagePullSecrets=_pull_secrets(k8s),
            priorityClassName=k8s.priority_class if k8s.queue is None else None,
            nodeSelector=k8s.node_selector or None,
            tolerations=_tolerations(k8s),
            containers=(container,),
            volumes=_volumes(k8s, job_name(spec), shm=shm),
        ),
    )


def _last_act(spec: JobSpec) -> Lifecycle:
    """For pods whose first process is not the worker, which would take the signal: ask the run and wait for it."""
    command = ("python", "-m", "launcher.jobs.prestop", spec.run, str(spec.stop_lead_s))
    return Lifecycle(preStop=Handler(exec=Exec(command=command)))


def _job_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Which start of which job this is, and what every process gets."""
    return (
        EnvVar(name="LAUNCHER_TARGET", value="kubernetes"),
        EnvVar(name="LAUNCHER_JOB_ID", value=job_name(spec)),
        EnvVar(name="LAUNCHER_JOB_RESTART", valueFrom=EnvSource(fieldRef=FieldRef(fieldPath=_RESTART))),
        *_common_env(spec),
    )


def _place_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Which node this is, and where node 0 is found: by the name that the JobSet gives its pod."""
    name = job_name(spec)
    rank = EnvVar(name="LAUNCHER_NODE_RANK", valueFrom=EnvSource(fieldRef=FieldRef(fieldPath=_INDEX)))
    meeting = EnvVar(name="LAUNCHER_RENDEZVOUS", value=f"{name}-{NODE}-0-0.{name}:{PORT}")
    return (EnvVar(name="LAUNCHER_NODES", value=str(spec.nodes)), rank, *((meeting,) if spec.nodes > 1 else ()))


def _common_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Folders that all nodes share, the recipe's settings, and secrets by name."""
    k8s = spec.cluster.kubernetes
    cache = f"{k8s.mount.rstrip('/')}/.cache"
    settings = {"LAUNCHER_CACHE": f"{cache}/launcher", "HF_HOME": f"{cache}/huggingface", **spec.env}
    plain = (EnvVar(name=name, value=_literal(value)) for name, value in sorted(settings.items()))
    secrets = (
        EnvVar(name=name, valueFrom=EnvSource(secretKeyRef=SecretKeyRef(name=k8s.secret or "", key=name)))
        for name in spec.env_names
    )
    return (*plain, *secrets)


def _literal(value: str) -> str:
    """Kubernetes would put other variables in place of $(NAME)."""
    return value.replace("$(", "$$(")


def _on_gpus(spec: JobSpec) -> bool:
    return spec.cluster.accelerator != "cpu"


def _resources(spec: JobSpec) -> Resources | None:
    """What a node's pod asks for; memory is also its limit, cores are not."""
    k8s = spec.cluster.kubernetes
    requests = {name: value for name, value in (("cpu", k8s.cpus), ("memory", k8s.memory)) if value is not None}
    limits = {"memory": k8s.memory} if k8s.memory is not None else {}
    if _on_gpus(spec):
        limits[k8s.gpu_resource] = str(spec.nproc_per_node)
    return Resources(requests=requests or None, limits=limits or None) if requests or limits else None


def _mounts(k8s: Kubernetes) -> tuple[VolumeMount, ...]:
    return (
        VolumeMount(name="runs", mountPath=k8s.mount),
        VolumeMount(name="recipe", mountPath=RECIPE.rpartition("/")[0], readOnly=True),
        VolumeMount(name="shm", mountPath="/dev/shm"),
    )


def _volumes(k8s: Kubernetes, name: str, *, shm: str | None = None) -> tuple[Volume, ...]:
    return (
        Volume(name="runs", persistentVolumeClaim=Claim(claimName=k8s.claim or "")),
        Volume(name="recipe", configMap=ConfigMapSource(name=name)),
        Volume(name="shm", emptyDir=EmptyDir(medium="Memory", sizeLimit=shm or k8s.shm)),
    )


def _topology(k8s: Kubernetes) -> ObjectMeta | None:
    if k8s.topology is None:
        return None
    return ObjectMeta(annotations={rules.TOPOLOGY[0 if k8s.topology_required else 1]: k8s.topology})


def _pull_secrets(k8s: Kubernetes) -> tuple[SecretName, ...] | None:
    return tuple(SecretName(name=name) for name in k8s.pull_secrets) or None


def _tolerations(k8s: Kubernetes) -> tuple[Toleration, ...] | None:
    return tuple(Toleration(**toleration) for toleration in k8s.tolerations) or None


def _image(k8s: Kubernetes) -> str:
    return k8s.image or ""  # `problems` asks for one


def _whole(cpus: str | None) -> int:
    """Cores, rounded down, as Ray counts them."""
    return math.floor(rules.quantity(cpus) or 0) if cpus else 0


MODELS: Mapping[str, type[Model]] = {"ConfigMap": ConfigMap, "JobSet": JobSet, "TrainJob": TrainJob, "RayJob": RayJob}
