"""Target `kubernetes`: manifests of three kinds that cannot be misspelt, in two layers; wrong recipes are answered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Problem, RecipeError, UserError
from launcher.jobs.spec import JobSpec, job_spec
from launcher.jobs.targets import kubernetes
from launcher.jobs.targets import problems as target_problems
from launcher.jobs.targets.kubernetes_jobs import objects
from launcher.jobs.targets.kubernetes_parts import job_name
from launcher.jobs.targets.kubernetes_validation import CRD_DIR, model_complaints, pod_complaints, read
from launcher.jobs.targets.manifests import jobset, pod, rayjob, rules, trainjob
from launcher.jobs.targets.manifests.strict import Model, complaints, plain
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.schema.cluster import Cluster
from launcher.recipe.schema.kubernetes import Kubernetes
from launcher.shipped import folder
from tests.jobs.test_targets import assert_golden

KINDS = ("jobset", "trainjob", "rayjob")
RECIPES = sorted(folder("recipes").glob("*.yaml"))
NEEDED = ["cluster.target=kubernetes", "cluster.kubernetes.image=ghcr.io/team/launcher:0.4.0",
          "cluster.kubernetes.claim=runs", "run.dir=/shared/runs"]  # fmt: skip
CRDS = pytest.mark.skipif(CRD_DIR not in os.environ, reason=f"{CRD_DIR} names no folder with CRDs")

FULL = Kubernetes(
    namespace="team-a", image="ghcr.io/team/launcher:0.4.0", pull_secrets=["registry"], claim="runs",
    secret="launcher-env", service_account="trainer", queue="gpu-queue", priority_class="research",
    topology="cloud.provider.com/topology-rack", topology_required=True, cpus="96", memory="1Ti", shm="64Gi",
    node_selector={"gpu": "h100"}, labels={"team": "a"}, annotations={"example.com/note": "it's ours"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
)  # fmt: skip
MACHINES = Cluster(
    target="kubernetes", nodes=2, nproc_per_node=8, env=["HF_TOKEN", "WANDB_API_KEY"], time_limit_min=720
)  # fmt: skip
SPEC = JobSpec(
    name="llama3.1-8b", run="/shared/runs/llama3.1-8b", env={"NCCL_DEBUG": "WARN", "MESSAGE": "it's $(HOSTNAME)"},
    files={"recipe.yaml": "# Resolved.\n{}\n"}, submission=3, cluster=MACHINES,
)  # fmt: skip


def spec_of(kind: str, **changes: Any) -> JobSpec:
    k8s = replace(FULL, kind=kind, **changes)  # type: ignore[arg-type]
    return replace(SPEC, cluster=replace(MACHINES, kubernetes=k8s))


def job_of(spec: JobSpec) -> dict[str, Any]:
    return plain(objects(spec)[1])


def node_pod(spec: JobSpec) -> Mapping[str, Any]:
    """The pod template of a JobSet's node."""
    template: Mapping[str, Any] = job_of(spec)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return template


def variables(container: Mapping[str, Any]) -> dict[str, Any]:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}


# whole texts


@pytest.mark.parametrize("kind", KINDS)
def test_l12_manifest_of_2x8_with_secrets_and_kueue_matches_golden(kind: str):
    rendered = kubernetes.render(spec_of(kind))
    assert set(rendered.files) == {"recipe.yaml", "job.yaml"}
    assert rendered.command == "kubectl create -f job.yaml"
    assert_golden(f"kubernetes-{kind}-2x8.yaml", rendered.files["job.yaml"])


@pytest.mark.parametrize("kind", KINDS)
def test_l12_rendering_reads_no_secret_and_is_the_same_twice(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "the-secret-value")
    first, second = kubernetes.render(spec_of(kind)), kubernetes.render(spec_of(kind))
    assert first == second
    assert "the-secret-value" not in str(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 4096])
def test_a_manifest_of_any_size_is_short_and_breaks_no_rule(kind: str, nodes: int):
    spec = spec_of(kind)
    text = kubernetes.manifest(replace(spec, cluster=replace(spec.cluster, nodes=nodes)))
    assert len(text) < 10_000
    assert [c for manifest in read(text) for c in model_complaints(manifest)] == []


# every shipped recipe, in both layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_for_our_models_and_for_kubernetes(path: Path, kind: str):
    for manifest in manifests_of(path, kind):
        assert model_complaints(manifest) == []
        assert list(pod_complaints(manifest)) == []


@CRDS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_for_the_crd_in_strict_mode(path: Path, kind: str):
    assert crd_complaints_of(manifests_of(path, kind)[1]) == []


@CRDS
@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_with_every_key_is_valid_for_the_crd_in_strict_mode(kind: str):
    assert crd_complaints_of(job_of(spec_of(kind))) == []


@CRDS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [{"suspendd": True}, {"activeDeadlineSeconds": "720"}, {"ttlSecondsAfterFinished": []}]
)
def test_the_crds_refuse_misspelt_and_mistyped_fields(kind: str, change: dict[str, Any]):
    job = job_of(spec_of(kind))
    assert crd_complaints_of({**job, "spec": {**job["spec"], **change}})


def test_crds_of_another_folder_are_named_and_a_missing_folder_is_the_users_mistake(tmp_path, monkeypatch):
    rendered = kubernetes.render(spec_of("jobset"))
    monkeypatch.setenv(CRD_DIR, str(tmp_path))
    last = list(kubernetes.validate(SPEC, rendered, tmp_path))[-1]
    assert (last.state, last.text) == ("skipped", f"{tmp_path}/jobset.x-k8s.io_jobsets.yaml is not there")
    monkeypatch.setenv(CRD_DIR, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--crds .*none: expected a folder with CustomResourceDefinitions"):
        list(kubernetes.validate(SPEC, rendered, tmp_path))
    monkeypatch.delenv(CRD_DIR)
    assert list(kubernetes.validate(SPEC, rendered, tmp_path))[-1].state == "skipped"


def test_a_schema_becomes_strict_only_where_it_names_properties():
    from launcher.jobs.targets.kubernetes_validation import strict

    open_ended = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}
    either = {"x-kubernetes-int-or-string": True, "pattern": "^x$"}
    schema = {"type": "object", "properties": {"free": {"type": "object"}, "open": open_ended, "either": either}}
    assert strict(schema)["additionalProperties"] is False
    assert "additionalProperties" not in strict(schema)["properties"]["free"]
    assert "additionalProperties" not in strict(schema)["properties"]["open"]
    assert strict(schema)["properties"]["either"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def manifests_of(path: Path, kind: str) -> list[dict[str, Any]]:
    recipe = load(path, [*NEEDED, f"cluster.kubernetes.kind={kind}"], rules=[target_problems]).recipe
    return read(kubernetes.render(job_spec(recipe, make_plan(recipe))).files["job.yaml"])


def crd_complaints_of(job: dict[str, Any]) -> list[str]:
    from launcher.jobs.targets.kubernetes_validation import FILES, crd_complaints

    return list(crd_complaints(job, Path(os.environ[CRD_DIR], FILES[job["kind"]])))


# models


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        (pod.Toleration, {"kei": "a"}, "kei"),
        (pod.Toleration, {"tolerationSeconds": True}, "tolerationSeconds: expected int, got True"),
        (pod.Toleration, {"operator": "exists"}, "operator: expected Exists or Equal, got 'exists'"),
        (pod.EnvVar, {"name": "A", "value": 1}, "value: expected str, got 1"),
        (pod.EnvSource, {"fieldRef": {"fieldPath": "a"}}, "fieldRef: expected FieldRef"),
        (pod.ObjectMeta, {"labels": {"a": 1}}, "labels.a: expected str, got 1"),
        (pod.Resources, {"limits": ("a",)}, "limits: expected a mapping"),
        (jobset.ExitCodes, {"containerName": "a", "operator": "In", "values": [1]}, "values: expected a list"),
        (
            jobset.Network,
            {"enableDNSHostnames": 1, "publishNotReadyAddresses": True, "subdomain": "a"},
            "expected bool",
        ),
        (jobset.FailureRule, {"name": "a", "action": "FailJobSet", "onJobFailureReasons": ("Podfailure",)}, "got"),
        (rayjob.SubmitterConfig, {"backoffLimit": "2"}, "backoffLimit: expected int, got '2'"),
        (trainjob.RuntimeRef, {"name": None}, "name: expected str, got None"),
        (trainjob.RuntimeRef, {}, "name"),
    ],
)
def test_a_misspelt_mistyped_or_missing_field_cannot_be_built(model: type[Model], values: dict[str, Any], said: str):
    with pytest.raises(TypeError, match=said.split("(")[0]):
        model(**values)


def test_a_model_writes_what_it_holds_and_leaves_out_what_is_none():
    variable = pod.EnvVar(name="A", valueFrom=pod.EnvSource(secretKeyRef=pod.SecretKeyRef(name="s", key="A")))
    assert plain(variable) == {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "A"}}}
    assert list(complaints(pod.EnvVar, plain(variable), "")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_read_by_the_same_models_with_the_place_and_the_nearest_name(kind: str):
    job = job_of(spec_of(kind))
    job["spec"]["suspendd"] = job["spec"].pop("suspend")
    assert model_complaints(job) == [f"{job['kind']}: spec.suspendd: no such field. Did you mean 'suspend'?"]
    del job["spec"]
    assert model_complaints(job) == [f"{job['kind']}: spec: missing"]
    assert model_complaints({"kind": "Pod"})[0].startswith("kind: 'Pod' is none of ConfigMap, JobSet")


def test_a_bad_manifest_is_a_bad_finding(tmp_path: Path):
    rendered = kubernetes.render(spec_of("jobset"))
    text = (
        rendered.files["job.yaml"]
        .replace("backoffLimit: 0", "backofLimit: 0")
        .replace("name: llama3-1-8b-3", "name: X")
    )
    rendered = replace(rendered, files={**rendered.files, "job.yaml": text})
    bad = [finding.text for finding in kubernetes.validate(SPEC, rendered, tmp_path) if finding.state == "bad"]
    assert any("backofLimit: no such field. Did you mean 'backoffLimit'?" in text for text in bad)
    assert any(text.startswith("ConfigMap: metadata.name: 'X' is no DNS-1123 name") for text in bad)


# rules that schemas do not hold


def change(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The object with another value at `spec.a.0.b`; None takes the field away."""
    *parents, last = path.split(".")
    place: Any = job
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    if value is None:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return job


JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("jobset", "metadata.name", "1st", "is no DNS-1035 name"),
        ("jobset", "metadata.name", "a" * 49, "pods would be called"),
        ("jobset", "metadata.labels", {"a b": "c"}, "'a b' is no label key"),
        ("jobset", "metadata.labels", {"team": "a" * 64}, "is no label value"),
        ("jobset", "metadata.annotations", {"note": "x" * (257 << 10)}, "bytes, at most"),
        ("jobset", "spec.suspend", None, "spec.suspend: must be true with the label kueue.x-k8s.io/queue-name"),
        ("jobset", "metadata.labels", {}, "kueue.x-k8s.io/queue-name is missing"),
        ("jobset", "spec.ttlSecondsAfterFinished", -1, "-1, at least 0"),
        ("jobset", "spec.network.subdomain", "a.b", "is no DNS-1035 name"),
        ("jobset", f"{JOB}.completions", 3, "completions and parallelism must be the same"),
        ("jobset", f"{JOB}.activeDeadlineSeconds", 0, "0, at least 1"),
        ("jobset", f"{JOB}.podFailurePolicy.rules.1.onExitCodes.containerName", "other", "no container 'other'"),
        ("jobset", f"{JOB}.podFailurePolicy.rules.1.onExitCodes.values", [0, 1], "without 0"),
        ("jobset", f"{POD}.restartPolicy", None, "must be Never with a podFailurePolicy"),
        ("jobset", f"{POD}.volumes", [], "no volume 'runs'"),
        ("jobset", f"{POD}.containers.0.resources.limits", {"memory": "1 Ti"}, "'1 Ti' is no quantity"),
        ("jobset", f"{POD}.containers.0.resources.requests", {"memory": "2Ti"}, "2Ti is above its limit 1Ti"),
        ("jobset", f"{POD}.containers.0.image", "Team/Launcher", "is no image reference"),
        ("jobset", f"{POD}.containers.0.env", [{"name": "A"}], "expected one value or source, got 0"),
        ("jobset", f"{POD}.containers.0.env", [{"name": "A", "value": "1"}] * 2, "A is set twice"),
        ("jobset", f"{POD}.tolerations.0.value", "x", "operator Exists takes no value"),
        ("jobset", f"{POD}.terminationGracePeriodSeconds", 0, "at least 1"),
        ("trainjob", "spec.trainer.env", [{"name": "PET_NNODES", "value": "2"}], "is set by the operator"),
        ("trainjob", "spec.trainer.numNodes", 0, "0, at least 1"),
        ("trainjob", "spec.runtimePatches.0.manager", "launcher", "each has its own manager, as domain/name"),
        ("trainjob", "metadata.name", "a" * 49, "pods would be called"),
        ("rayjob", "metadata.name", "a" * 48, "48 characters, at most 47 for a RayJob"),
        ("rayjob", "spec.shutdownAfterJobFinishes", False, "spec.suspend: needs shutdownAfterJobFinishes"),
        ("rayjob", "spec.shutdownAfterJobFinishes", False, "must be true with the label kueue"),
        ("rayjob", "spec.backoffLimit", -1, "-1, at least 0"),
        ("rayjob", "spec.submissionMode", "SidecarMode", "not with SidecarMode"),
        ("rayjob", "spec.entrypoint", "a && b", "one command"),
        ("rayjob", f"{WORKERS}.groupName", "Nodes", "is no DNS-1035 name"),
        ("rayjob", f"{WORKERS}.minReplicas", 3, "minReplicas <= replicas <= maxReplicas"),
        ("rayjob", f"{WORKERS}.template.spec.volumes.0.name", "a_b", "must be a DNS-1123 label"),
    ],
)
def test_a_rule_that_no_schema_holds_is_kept_by_ours(kind: str, path: str, value: Any, said: str):
    job = read(kubernetes.manifest(spec_of(kind)))[1]
    assert list(rules.broken(job)) == []
    complaints = list(rules.broken(change(job, path, value)))
    assert any(said in complaint for complaint in complaints), complaints


def test_a_ttl_needs_that_the_cluster_is_shut_down():
    job = change(read(kubernetes.manifest(spec_of("rayjob", ttl_s=60)))[1], "spec.shutdownAfterJobFinishes", False)
    assert "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes" in list(rules.broken(job))


def test_a_config_map_holds_a_mebibyte_at_most():
    config = read(
        kubernetes.manifest(replace(SPEC, cluster=spec_of("jobset").cluster, files={"recipe.yaml": "x" * (1 << 20)}))
    )
    assert list(rules.broken(config[0])) == []
    config[0]["data"]["recipe.yaml"] += "x"
    assert list(rules.broken(config[0])) == ["data: 1048577 bytes, at most 1048576"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("500m", 0.5), ("16Gi", 16 << 30), ("1e3", 1000), ("1.5k", 1500), ("2E", 2 * 10**18), (".5", 0.5),
     ("16GB", None), ("-1", None), ("", None), ("1 Gi", None), ("Gi", None)],
)  # fmt: skip
def test_quantities_are_read_as_kubernetes_does(text: str, value: float | None):
    assert rules.quantity(text) == value


# what the pods get


def test_a_node_of_a_jobset_starts_the_worker_itself_and_knows_its_place():
    container = node_pod(spec_of("jobset"))["spec"]["containers"][0]
    assert container["command"] == ["launcher", "worker", SPEC.run, "--recipe", "/etc/launcher/recipe.yaml"]
    env = variables(container)
    assert env["LAUNCHER_TARGET"] == "kubernetes"
    assert env["LAUNCHER_JOB_ID"] == "llama3-1-8b-3"
    assert (
        env["LAUNCHER_JOB_RESTART"]["fieldRef"]["fieldPath"] == "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    )
    assert env["LAUNCHER_NODES"] == "2"
    assert env["LAUNCHER_RENDEZVOUS"] == "llama3-1-8b-3-node-0-0.llama3-1-8b-3:29400"
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "launcher-env", "key": "HF_TOKEN"}}
    assert env["MESSAGE"] == "it's $$(HOSTNAME)"  # else Kubernetes would put its own HOSTNAME there


def test_the_place_that_a_jobset_tells_is_one_that_the_worker_understands():
    from launcher.jobs.place import find_place, find_submission, settled

    env = {
        k: v for k, v in variables(node_pod(spec_of("jobset"))["spec"]["containers"][0]).items() if isinstance(v, str)
    }
    env |= {"LAUNCHER_JOB_RESTART": "2", "JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    place = find_place(
        nodes=int(env["LAUNCHER_NODES"]), node_rank=1, rendezvous=env["LAUNCHER_RENDEZVOUS"], environment=env
    )
    assert settled(place, 2) == (1, "llama3-1-8b-3-node-0-0.llama3-1-8b-3:29400")
    assert place.names_may_come
    submission = find_submission(env)
    assert submission is not None
    assert (submission.target, submission.job_id, submission.restart) == ("kubernetes", "llama3-1-8b-3", 2)


def test_a_train_job_leaves_the_place_to_the_operators_variables():
    trainer = job_of(spec_of("trainjob"))["spec"]["trainer"]
    assert not {name for name in variables(trainer) if name.startswith("PET_")}
    assert not {"LAUNCHER_NODES", "LAUNCHER_NODE_RANK", "LAUNCHER_RENDEZVOUS"} & set(variables(trainer))
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)


def test_exit_codes_of_the_worker_decide_whether_a_jobset_starts_again():
    spec = job_of(spec_of("jobset"))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    count, fail = job["podFailurePolicy"]["rules"]
    assert count == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert fail["onExitCodes"]["values"] == [1, 2]  # and 75, or death by a signal, fails the job, so that all restart
    assert spec["failurePolicy"]["rules"] == [
        {"name": "stopped_for_good", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_pods_are_given_the_stop_lead_and_a_margin_to_end():
    assert node_pod(spec_of("jobset"))["spec"]["terminationGracePeriodSeconds"] == 360


def test_the_head_of_a_ray_cluster_trains_nothing_and_its_workers_are_the_nodes():
    spec = job_of(spec_of("rayjob"))["spec"]
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"}
    assert "nvidia.com/gpu" not in str(head["template"]["spec"]["containers"][0]["resources"])
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 2, 2)
    assert workers["rayStartParams"] == {"num-cpus": "96", "num-gpus": "8"}
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert spec["entrypoint"].startswith("python -m launcher.jobs.ray_driver /shared/runs/llama3.1-8b --recipe ")
    assert variables(head["template"]["spec"]["containers"][0])["RAY_JOB_STOP_WAIT_TIME_S"] == "300"


def test_pods_of_a_ray_cluster_ask_the_run_for_a_checkpoint_before_they_go():
    cluster = job_of(spec_of("rayjob"))["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "launcher.jobs.prestop", SPEC.run, "300"]
    assert "lifecycle" not in node_pod(spec_of("jobset"))["spec"]["containers"][0]  # the worker takes the signal itself


def test_the_driver_takes_the_arguments_of_the_entrypoint():
    import shlex

    from launcher.jobs.ray_driver import _parser

    words = shlex.split(job_of(spec_of("rayjob"))["spec"]["entrypoint"])
    given = _parser().parse_args(words[3:])
    assert (given.run, given.recipe) == (SPEC.run, "/etc/launcher/recipe.yaml")


def test_a_job_on_the_cpu_asks_for_no_gpus():
    spec = spec_of("rayjob", cpus=None, memory=None)
    spec = replace(spec, cluster=replace(spec.cluster, accelerator="cpu"))
    (workers,) = job_of(spec)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["rayStartParams"] == {"num-cpus": "8"}
    assert "resources" not in workers["template"]["spec"]["containers"][0]


def test_without_a_queue_nothing_is_suspended_and_the_priority_is_the_pods():
    spec = spec_of("jobset", queue=None, topology=None, topology_required=False)
    job = job_of(spec)
    assert "suspend" not in job["spec"]
    assert job["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "launcher", "team": "a"}
    assert node_pod(spec)["spec"]["priorityClassName"] == "research"
    assert "metadata" not in node_pod(spec)


def test_a_name_of_cluster_env_comes_from_the_secret_even_where_we_would_set_it():
    spec = spec_of("jobset")
    named = replace(spec, cluster=replace(spec.cluster, env=["HF_HOME"]))
    env = variables(node_pod(named)["spec"]["containers"][0])
    assert env["HF_HOME"] == {"secretKeyRef": {"name": "launcher-env", "key": "HF_HOME"}}


def test_topology_may_be_required_or_preferred():
    required = node_pod(spec_of("jobset"))["metadata"]["annotations"]
    preferred = node_pod(spec_of("jobset", topology_required=False))["metadata"]["annotations"]
    assert required == {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-rack"}
    assert preferred == {"kueue.x-k8s.io/podset-preferred-topology": "cloud.provider.com/topology-rack"}


def test_the_recipe_travels_as_it_is_in_the_config_map():
    recipe = load(folder("recipes") / "tiny-cpu.yaml", NEEDED).recipe
    spec = job_spec(recipe, make_plan(recipe))
    config, _ = read(kubernetes.render(spec).files["job.yaml"])
    assert config["data"] == {"recipe.yaml": spec.files["recipe.yaml"]}
    assert config["metadata"]["name"] == "tiny-cpu-1"


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [("llama3.1-8b", 1, "llama3-1-8b-1"), ("7B_run", 12, "run-7b-run-12"), ("A", 2, "a-2"), ("...", 1, "run-1")],
)
def test_each_submission_of_a_run_has_a_name_of_its_own(name: str, number: int, expected: str):
    assert job_name(replace(SPEC, name=name, submission=number)) == expected


# wrong recipes


def problems(tmp_path: Path, *overrides: str, base: list[str] = NEEDED) -> list[Problem]:
    """What is said of a good recipe that these change."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: org/model}\ndata: {train: [{path: org/data}], seq_len: 128}\n"
        "train: {global_batch_size: 16, max_steps: 5}\ncluster: {nodes: 2, nproc_per_node: 8}\n"
    )
    try:
        load(recipe, [*base, *overrides], rules=[target_problems])
    except RecipeError as error:
        return list(error.problems)
    return []


def test_the_recipe_that_the_wrong_ones_change_is_right(tmp_path: Path):
    assert problems(tmp_path) == []


WRONG = [
    (["image=null"], "image = null: expected a container image that holds launcher and its extras"),
    (["image='my image'"], "image = my image: expected an image reference, as ghcr.io/team/launcher:0.4.0"),
    (["claim=null"], "claim = null: expected the name of a ReadWriteMany PersistentVolumeClaim"),
    (["claim=My_Claim"], "claim = My_Claim: expected a name of letters a-z, digits, - and ."),
    (["namespace=team.a"], "namespace = team.a: expected letters a-z, digits and - (at most 63)"),
    (["mount=shared"], "mount = shared: expected an absolute path that hides nothing of the image. Use /shared."),
    (["mount=/usr"], "mount = /usr: expected an absolute path that hides nothing"),
    (["mount=/data"], "run.dir = /shared/runs: expected a folder below cluster.kubernetes.mount = /data. "
                      "Use run.dir=/data/runs."),
    (["ttl_s=-1"], "ttl_s = -1: expected 0 seconds or more, or null"),
    (["memory=512GB"], "memory = 512GB: expected a quantity above 0, as 512Gi"),
    (["cpus='0'"], "cpus = 0: expected a quantity above 0, as 16 or 500m"),
    (["memory=8Gi"], "shm = 16Gi: expected at most cluster.kubernetes.memory = 8Gi, of which /dev/shm is a part"),
    (["gpu_resource=gpu"], "gpu_resource = gpu: expected a resource, as nvidia.com/gpu"),
    (["topology=rack"], "topology = rack: expected null without cluster.kubernetes.queue"),
    (["topology_required=true"], "topology_required = true: expected false, or a node label"),
    (["labels={team: 'a b'}"], "labels.team = a b: expected at most 63 letters, digits, - _ ."),
    (["labels={'my team': a}"], "labels = my team: expected a label key, as team or example.com/team"),
    (["labels={kueue.x-k8s.io/queue-name: q}"], "no label that launcher sets itself. Use cluster.kubernetes.queue"),
    (["annotations={'a b': c}"], "annotations = a b: expected an annotation key"),
    (["node_selector={gpu: 'h 100'}"], "node_selector.gpu = h 100: expected at most 63 letters"),
    (["tolerations=[{kei: a}]"], "tolerations.0 = {kei: a}: expected keys key, operator, value, effect"),
    (["tolerations=[{key: a, operator: Exists, value: b}]"], "operator Exists takes no value."),
    (["queue=Gpu_Queue"], "queue = Gpu_Queue: expected the name of a LocalQueue"),
    (["pull_secrets=[My_Secret]"], "pull_secrets.0 = My_Secret: expected the name of a Secret"),
    (["service_account=a/b"], "service_account = a/b: expected a name of letters a-z"),
    (["runtime=mine"], "runtime = mine: expected nothing, because cluster.kubernetes.kind is jobset"),
    (["ray_version=2.60.0"], "ray_version = 2.60.0: expected nothing, because cluster.kubernetes.kind is jobset"),
    (["kind=rayjob", "ray_version=new"], "ray_version = new: expected a version, as 2.60.0"),
    (["kind=trainjob", "ttl_s=60"], "ttl_s = 60: expected null, because a TrainJob has no such field"),
    (["kind=trainjob", "priority_class=high"], "priority_class = high: expected null without"),
    (["kind=pod"], "kind = pod: expected jobset, trainjob or rayjob"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=lambda value: str(value[0]) if isinstance(value, list) else "")
def test_a_wrong_key_is_answered_with_key_value_and_what_is_expected(tmp_path: Path, changes: list[str], said: str):
    found = problems(tmp_path, *(f"cluster.kubernetes.{change}" for change in changes))
    assert any(said in str(problem) for problem in found), "\n".join(map(str, found))
    assert len(found) == 1, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.env=[HF_TOKEN]"], "cluster.kubernetes.secret = null: expected the name of a Secret with the keys "
         "HF_TOKEN, because cluster.env names them. Make it by: kubectl create secret generic launcher-env"),
        (["run.dir=runs"], "expected a folder below cluster.kubernetes.mount = /shared. Use run.dir=/shared/runs."),
        (["run.dir='/shared/my runs'"], "run.dir = /shared/my runs: expected a path of letters, digits"),
        (["run.name=" + "a" * 45], "expected at most 44 characters, since names are made from it (a JobSet of 2 "
         "nodes). Use run.name=" + "a" * 44 + "."),
        (["run.name=" + "a" * 44, "cluster.kubernetes.kind=rayjob"], "expected at most 43 characters"),
        (["cluster.snapshot=true"], "cluster.snapshot = true: expected false: pods run the code of"),
        (["cluster.kubernetes.kind=rayjob", "cluster.ray.address=http://head:8265"], "null: a RayJob has a cluster of"),
        (["cluster.kubernetes.kind=rayjob", "cluster.ray.working_dir=."], "null: pods run the code of"),
        (["cluster.kubernetes.kind=rayjob", "cluster.ray.resources={rack_a: 1}"], "empty: a RayJob's workers are"),
        (["model.tokenizer=/home/me/tokenizer"], "model.tokenizer = /home/me/tokenizer: expected a path below "
         "cluster.kubernetes.mount = /shared, which is all that pods see. Copy it to the claim, and write "
         "/shared/tokenizer."),
        (["data.train=[{path: chat.jsonl}]"], "data.train.0.path = chat.jsonl: expected a path below"),
        (["data.cache_dir=/tmp/cache"], "data.cache_dir = /tmp/cache: expected a path below"),
        (["data.chat_template=/etc/chatml.jinja"], "data.chat_template = /etc/chatml.jinja: expected a path below"),
    ],
)  # fmt: skip
def test_what_does_not_fit_kubernetes_is_answered_before_anything_is_made(
    tmp_path: Path, overrides: list[str], said: str
):
    found = problems(tmp_path, *overrides)
    assert [said in str(problem) for problem in found] == [True], "\n".join(map(str, found))


def test_all_problems_come_at_once_with_the_place_of_each(tmp_path: Path):
    found = problems(tmp_path, "cluster.kubernetes.shm=big", base=["cluster.target=kubernetes"])
    assert {problem.key for problem in found} == {
        "cluster.kubernetes.image", "cluster.kubernetes.claim", "run.dir", "cluster.kubernetes.shm",
    }  # fmt: skip


def test_paths_below_the_mount_are_not_looked_for_here_but_inside_of_the_job(tmp_path, monkeypatch):
    overrides = ["model.name=/shared/llama", "data.train=[{path: /shared/chat.jsonl}]", "data.cache_dir=/shared/cache"]
    assert problems(tmp_path, *overrides) == []
    monkeypatch.setenv("LAUNCHER_JOB_ID", "recipe-1")
    assert [problem.key for problem in problems(tmp_path, *overrides)] == ["model.name", "data.train.0.path"]


def test_another_target_looks_for_the_same_paths_here(tmp_path: Path):
    found = problems(tmp_path, "model.name=/shared/llama", base=[])
    assert [problem.key for problem in found] == ["model.name"]


def test_rendering_imports_no_client_no_pydantic_and_no_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom launcher.jobs.targets import kubernetes\nfrom launcher.jobs.spec import JobSpec\n"
        "spec = JobSpec(name='a', run='/shared/a')\n"
        "list(kubernetes.problems(spec)), kubernetes.render(spec)\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "kubernetes", "pydantic", "jsonschema", "kubernetes_validate", "ray", "omegaconf"}
    assert not set(done.stdout.split()) & heavy
