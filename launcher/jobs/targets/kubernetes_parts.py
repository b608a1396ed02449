"""What the three kinds of Kubernetes job share: names, environment, volumes, resources, and the template of a pod."""

from __future__ import annotations

import re

from launcher.jobs.spec import JobSpec
from launcher.jobs.targets.manifests import rules
from launcher.jobs.targets.manifests.pod import (
    Claim,
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
from launcher.recipe.schema.kubernetes import Kubernetes

NODE = "node"  # the replicated job of a JobSet and, by Kubeflow's convention, of a runtime; and the latter's container
PORT = 29400
RECIPE = "/etc/launcher/recipe.yaml"
GRACE_MARGIN_S = 60  # beside cluster.stop_lead_s, for the processes around the checkpoint to end
SUBMISSION_DIGITS = 3  # room in a job's name
_RESTART = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


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


def grace_s(spec: JobSpec) -> int:
    """Seconds between SIGTERM and SIGKILL."""
    return spec.stop_lead_s + GRACE_MARGIN_S


def worker_command(spec: JobSpec) -> tuple[str, ...]:
    """The container's command, without a shell: the signal of a preemption reaches the worker itself."""
    return ("launcher", "worker", spec.run, "--recipe", RECIPE)


def metadata(k8s: Kubernetes, name: str) -> ObjectMeta:
    labels = {"app.kubernetes.io/managed-by": "launcher", **k8s.labels}
    if k8s.queue is not None:
        labels[rules.QUEUE] = k8s.queue
        if k8s.priority_class is not None:
            labels["kueue.x-k8s.io/priority-class"] = k8s.priority_class
    return ObjectMeta(name=name, namespace=k8s.namespace, labels=labels, annotations=k8s.annotations or None)


def suspend(k8s: Kubernetes) -> bool | None:
    """Kueue lets it go; said here too, so that a cluster without Kueue does not start it past the queue."""
    return True if k8s.queue is not None else None


def deadline_s(spec: JobSpec) -> int | None:
    """When Kubernetes itself ends what has not asked itself to stop (cluster.stop_lead_s before)."""
    return None if spec.time_limit_min is None else spec.time_limit_min * 60


def template(
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
        image=image(k8s),
        command=command,
        env=env,
        resources=resources,
        lifecycle=_last_act(spec) if command is None else None,
        volumeMounts=mounts(k8s),
    )
    return PodTemplate(
        metadata=metadata,
        spec=PodSpec(
            restartPolicy="Never",
            terminationGracePeriodSeconds=grace_s(spec),
            serviceAccountName=k8s.service_account,
            imagePullSecrets=pull_secrets(k8s),
            priorityClassName=k8s.priority_class if k8s.queue is None else None,
            nodeSelector=k8s.node_selector or None,
            tolerations=tolerations(k8s),
            containers=(container,),
            volumes=volumes(k8s, job_name(spec), shm=shm),
        ),
    )


def _last_act(spec: JobSpec) -> Lifecycle:
    """For pods whose first process is not the worker, which would take the signal: ask the run and wait for it."""
    command = ("python", "-m", "launcher.jobs.prestop", spec.run, str(spec.stop_lead_s))
    return Lifecycle(preStop=Handler(exec=Exec(command=command)))


def job_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Which start of which job this is, and what every process gets."""
    return (
        EnvVar(name="LAUNCHER_TARGET", value="kubernetes"),
        EnvVar(name="LAUNCHER_JOB_ID", value=job_name(spec)),
        EnvVar(name="LAUNCHER_JOB_RESTART", valueFrom=EnvSource(fieldRef=FieldRef(fieldPath=_RESTART))),
        *common_env(spec),
    )


def place_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Which node this is, and where node 0 is found: by the name that the JobSet gives its pod."""
    name = job_name(spec)
    rank = EnvVar(name="LAUNCHER_NODE_RANK", valueFrom=EnvSource(fieldRef=FieldRef(fieldPath=_INDEX)))
    meeting = EnvVar(name="LAUNCHER_RENDEZVOUS", value=f"{name}-{NODE}-0-0.{name}:{PORT}")
    return (EnvVar(name="LAUNCHER_NODES", value=str(spec.nodes)), rank, *((meeting,) if spec.nodes > 1 else ()))


def common_env(spec: JobSpec) -> tuple[EnvVar, ...]:
    """Folders that all nodes share, the recipe's settings, and secrets by name."""
    k8s = spec.cluster.kubernetes
    cache = f"{k8s.mount.rstrip('/')}/.cache"
    settings = {"LAUNCHER_CACHE": f"{cache}/launcher", "HF_HOME": f"{cache}/huggingface", **spec.env}
    plain = (
        EnvVar(name=name, value=_literal(value))
        for name, value in sorted(settings.items())
        if name not in spec.env_names
    )
    secrets = (
        EnvVar(name=name, valueFrom=EnvSource(secretKeyRef=SecretKeyRef(name=k8s.secret or "", key=name)))
        for name in spec.env_names
    )
    return (*plain, *secrets)


def _literal(value: str) -> str:
    """Kubernetes would put other variables in place of $(NAME)."""
    return value.replace("$(", "$$(")


def on_gpus(spec: JobSpec) -> bool:
    return spec.cluster.accelerator != "cpu"


def resources(spec: JobSpec) -> Resources | None:
    """What a node's pod asks for; memory is also its limit, cores are not."""
    k8s = spec.cluster.kubernetes
    requests = {name: value for name, value in (("cpu", k8s.cpus), ("memory", k8s.memory)) if value is not None}
    limits = {"memory": k8s.memory} if k8s.memory is not None else {}
    if on_gpus(spec):
        limits[k8s.gpu_resource] = str(spec.nproc_per_node)
    return Resources(requests=requests or None, limits=limits or None) if requests or limits else None


def mounts(k8s: Kubernetes) -> tuple[VolumeMount, ...]:
    return (
        VolumeMount(name="runs", mountPath=k8s.mount),
        VolumeMount(name="recipe", mountPath=RECIPE.rpartition("/")[0], readOnly=True),
        VolumeMount(name="shm", mountPath="/dev/shm"),
    )


def volumes(k8s: Kubernetes, name: str, *, shm: str | None = None) -> tuple[Volume, ...]:
    return (
        Volume(name="runs", persistentVolumeClaim=Claim(claimName=k8s.claim or "")),
        Volume(name="recipe", configMap=ConfigMapSource(name=name)),
        Volume(name="shm", emptyDir=EmptyDir(medium="Memory", sizeLimit=shm or k8s.shm)),
    )


def topology(k8s: Kubernetes) -> ObjectMeta | None:
    if k8s.topology is None:
        return None
    return ObjectMeta(annotations={rules.TOPOLOGY[0 if k8s.topology_required else 1]: k8s.topology})


def pull_secrets(k8s: Kubernetes) -> tuple[SecretName, ...] | None:
    return tuple(SecretName(name=name) for name in k8s.pull_secrets) or None


def tolerations(k8s: Kubernetes) -> tuple[Toleration, ...] | None:
    return tuple(Toleration(**toleration) for toleration in k8s.tolerations) or None


def image(k8s: Kubernetes) -> str:
    return k8s.image or ""  # `problems` asks for one
