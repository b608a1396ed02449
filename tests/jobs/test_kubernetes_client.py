"""Submit, status, logs and cancel by the real Kubernetes client, over HTTP, against a fake API server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.jobs.job import Job
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets import kubernetes
from launcher.jobs.targets.kubernetes_server import KINDS
from launcher.jobs.targets.kubernetes_status import status_of
from launcher.jobs.targets.kubernetes_validation import CRD_DIR
from launcher.recipe.schema.cluster import Cluster
from launcher.recipe.schema.kubernetes import Kubernetes
from tests.jobs.api_server import ApiServer, api_server

NAMES = ("jobset", "trainjob", "rayjob")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A server with every operator, the claim and the Secret; the current context leads to it."""
    with api_server() as server:
        server.served = {f"{kind.group}/{kind.version}/{kind.plural}" for kind in KINDS.values()}
        server.served |= {"kueue.x-k8s.io/v1beta1/localqueues", "kueue.x-k8s.io/v1beta1/workloads"}
        server.put("persistentvolumeclaims", {"metadata": {"name": "runs"}, "spec": {"accessModes": ["ReadWriteMany"]}})
        server.put("secrets", {"metadata": {"name": "launcher-env"}, "data": {"HF_TOKEN": "dGhlLXNlY3JldA=="}})
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield server


def spec_of(kind: str = "jobset", **changes: Any) -> JobSpec:
    k8s = Kubernetes(kind=kind, image="team/launcher:1", claim="runs", secret="launcher-env", **changes)  # type: ignore[arg-type]
    cluster = Cluster(target="kubernetes", nodes=2, nproc_per_node=8, env=["HF_TOKEN"], kubernetes=k8s)
    return JobSpec(name="big", run="/shared/runs/big", cluster=cluster, files={"recipe.yaml": "{}\n"})


def submitted(spec: JobSpec, folder: Path) -> Job:
    return kubernetes.submit(spec, kubernetes.render(spec), folder)


def job_of(kind: str, name: str = "big-1") -> Job:
    more = {"kind": kind, "namespace": "team-a", "context": "lab"}
    return Job(target="kubernetes", id=name, folder=Path("job"), run=Path("/shared/runs/big"), more=more)


def put(api: ApiServer, kind: str, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """An object as the API server holds it."""
    return api.put(KINDS[kind].plural, thing(kind, status, **spec))


def thing(kind: str, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    where = KINDS[kind]
    found = {
        "apiVersion": f"{where.group}/{where.version}", "kind": where.kind, "spec": spec,
        "metadata": {"name": "big-1", "namespace": "team-a", "uid": "uid-of-big-1"},
    }  # fmt: skip
    return found if status is None else {**found, "status": status}


def condition(kind: str, reason: str, message: str, status: str = "True") -> dict[str, str]:
    when = "2026-11-21T12:00:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": when}


def pod(rank: int, *, node: str | None = None, labels: dict[str, str] | None = None, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"big-1-node-0-{rank}-abcde",
            "labels": labels or {"jobset.sigs.k8s.io/jobset-name": "big-1"},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(rank)},
        },
        "spec": {"nodeName": node} if node else {},
        "status": status,
    }


# submit


@pytest.mark.parametrize("kind", NAMES)
def test_submit_creates_the_config_map_and_the_job_after_the_server_has_tried_it(api: ApiServer, tmp_path, kind: str):
    job = submitted(spec_of(kind), tmp_path)
    assert job.id == "big-1"
    assert dict(job.more) == {"kind": kind, "namespace": "team-a", "context": "lab"}
    plural = KINDS[kind].plural
    assert [request for request in api.asked if request.startswith("POST")] == [
        f"POST {plural} dryRun=All", "POST configmaps", f"POST {plural}",
    ]  # fmt: skip
    config = api.objects["configmaps", "team-a", "big-1"]
    assert config["data"] == {"recipe.yaml": "{}\n"}
    (owner,) = config["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == (KINDS[kind].kind, "big-1", "uid-of-big-1")


def test_the_namespace_of_the_recipe_comes_before_that_of_the_context(api: ApiServer, tmp_path):
    api.put("persistentvolumeclaims", {"metadata": {"name": "runs"}, "spec": {}}, namespace="team-b")
    api.put("secrets", {"metadata": {"name": "launcher-env"}}, namespace="team-b")
    assert submitted(spec_of(namespace="team-b"), tmp_path).more["namespace"] == "team-b"
    assert ("jobsets", "team-b", "big-1") in api.objects


def test_the_values_of_a_secret_are_never_asked_for(api: ApiServer, tmp_path):
    submitted(spec_of(), tmp_path)
    asked = [accept for request, accept in zip(api.asked, api.accepts, strict=True) if request == "GET secrets"]
    assert asked == ["application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"]


def refused(api: ApiServer, spec: JobSpec, folder: Path) -> str:
    """The text of the error; the server is left as it was."""
    before = dict(api.objects)
    with pytest.raises(UserError) as error:
        submitted(spec, folder)
    assert api.objects == before
    return str(error.value)


def test_a_claim_that_is_not_there_is_named_before_anything_is_made(api: ApiServer, tmp_path):
    del api.objects["persistentvolumeclaims", "team-a", "runs"]
    said = "cluster.kubernetes.claim = runs: namespace team-a has no PersistentVolumeClaim of that name."
    assert refused(api, spec_of(), tmp_path) == said


def test_a_claim_that_one_node_alone_can_mount_is_refused_for_two(api: ApiServer, tmp_path):
    api.objects["persistentvolumeclaims", "team-a", "runs"]["spec"]["accessModes"] = ["ReadWriteOnce"]
    said = refused(api, spec_of(), tmp_path)
    assert said.endswith("expected a claim with ReadWriteMany for 2 nodes, it has ReadWriteOnce.")
    spec = spec_of()
    one = replace(spec, cluster=replace(spec.cluster, nodes=1))
    assert submitted(one, tmp_path).id == "big-1"


def test_a_missing_secret_comes_with_the_command_that_makes_it(api: ApiServer, tmp_path):
    del api.objects["secrets", "team-a", "launcher-env"]
    assert "kubectl create secret generic launcher-env -n team-a --from-literal=HF_TOKEN=..." in refused(
        api, spec_of(), tmp_path
    )


def test_what_a_user_may_not_look_at_is_left_to_the_pods(api: ApiServer, tmp_path):
    api.refusals = {("GET", "secrets"): (403, "forbidden"), ("GET", "persistentvolumeclaims"): (403, "forbidden")}
    assert submitted(spec_of(), tmp_path).id == "big-1"


def test_a_queue_that_is_not_there_would_leave_the_job_suspended(api: ApiServer, tmp_path):
    assert "queue = gpus: namespace team-a has no LocalQueue of that name" in refused(
        api, spec_of(queue="gpus"), tmp_path
    )
    api.put("localqueues", {"metadata": {"name": "gpus"}})
    submitted(spec_of(queue="gpus"), tmp_path)
    assert api.objects["jobsets", "team-a", "big-1"]["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("kind", "operator"), [("jobset", "JobSet"), ("trainjob", "Kubeflow Trainer"), ("rayjob", "KubeRay")]
)
def test_an_operator_that_is_not_installed_is_named(api: ApiServer, tmp_path, kind: str, operator: str):
    api.served.clear()
    said = refused(api, spec_of(kind), tmp_path)
    assert f"of context lab has no {KINDS[kind].group}/{KINDS[kind].version}" in said
    assert f"Its operator, {operator}, must be installed" in said


def test_a_job_of_that_name_which_is_there_already_is_left_alone(api: ApiServer, tmp_path):
    put(api, "jobset")
    assert "JobSet big-1 exists already in namespace team-a. If it is over: kubectl delete jobsets big-1" in refused(
        api, spec_of(), tmp_path
    )


def test_the_words_of_a_webhook_are_passed_on(api: ApiServer, tmp_path):
    api.refusals["POST", "jobsets"] = (
        422,
        "admission webhook vjobset.kb.io denied the request: JobSet name is too long.",
    )
    said = refused(api, spec_of(), tmp_path)
    assert said == (
        "JobSet big-1 in namespace team-a: the API server refused (422 Unprocessable Entity): "
        "admission webhook vjobset.kb.io denied the request: JobSet name is too long."
    )


def test_a_config_map_goes_again_when_the_job_is_refused_after_it(api: ApiServer, tmp_path, monkeypatch):
    from launcher.jobs.targets.kubernetes_server import Server

    create = Server.create

    def only_tried(self: Server, *args: Any, **options: str) -> dict[str, Any]:
        if not options:
            raise UserError("quota exceeded")
        return create(self, *args, **options)

    monkeypatch.setattr(Server, "create", only_tried)
    assert refused(api, spec_of(), tmp_path) == "quota exceeded"


def test_a_server_that_does_not_answer_is_named(api: ApiServer, tmp_path, monkeypatch):
    api.url = "http://127.0.0.1:1"
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "elsewhere")))
    with pytest.raises(UserError, match=r"no answer from the API server at http://127\.0\.0\.1:1 \(.*refused"):
        submitted(spec_of(), tmp_path)
    assert kubernetes.status(job_of("jobset")).state == "unknown"


def test_without_the_client_the_command_of_kubectl_is_said_and_nothing_is_submitted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError) as error:
        submitted(spec_of(), tmp_path)
    assert "pip install 'train-launcher[kubernetes]'" in str(error.value)
    assert str(error.value).endswith(
        "Nothing was submitted. By hand: launcher render RECIPE --target kubernetes -o job "
        "&& kubectl create -f job/job.yaml"
    )
    assert kubernetes.status(job_of("jobset")).state == "unknown"


def test_without_a_context_the_command_of_kubectl_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match=r"No Kubernetes context: .*KUBECONFIG names another file.*kubectl create -f"):
        submitted(spec_of(), tmp_path)


def test_a_context_that_is_gone_is_named_with_those_there_are(api: ApiServer):
    job = replace(job_of("jobset"), more={**job_of("jobset").more, "context": "old"})
    status = kubernetes.status(job)
    assert (status.state, status.reason) == (
        "unknown", "kubeconfig: no context 'old', by which the job was submitted. There are: lab.",
    )  # fmt: skip


# status


def parts(**counts: int) -> list[dict[str, Any]]:
    zero = {"active": 0, "failed": 0, "ready": 0, "succeeded": 0, "suspended": 0}
    return [{"name": "node", **zero, **counts}]


SUSPENDED = condition("Suspended", "SuspendedJobs", "jobset is suspended")
STATES: list[tuple[str, dict[str, Any] | None, dict[str, Any], str, str]] = [
    ("jobset", None, {}, "queued", "no controller has taken up the JobSet yet"),
    ("jobset", {"restarts": 0}, {}, "queued", "no pods yet"),
    ("jobset", {"conditions": [SUSPENDED]}, {"suspend": True}, "queued", "SuspendedJobs: jobset is suspended"),
    ("jobset", {"replicatedJobsStatus": parts(active=1)}, {}, "starting", "its pods are being made ready"),
    ("jobset", {"replicatedJobsStatus": parts(active=1, ready=1)}, {}, "running", ""),
    ("jobset", {"restarts": 2, "replicatedJobsStatus": parts(active=1, ready=1)}, {}, "running", "restart 2"),
    ("jobset", {"restarts": 1, "replicatedJobsStatus": parts()}, {}, "preempted-will-return",
     "restart 1: its pods are being made again"),
    ("jobset", {"restarts": 1, "conditions": [SUSPENDED]}, {"suspend": True}, "preempted-will-return",
     "SuspendedJobs: jobset is suspended"),
    ("jobset", {"conditions": [condition("Completed", "AllJobsCompleted", "jobset completed successfully")]}, {},
     "finished", "AllJobsCompleted: jobset completed successfully"),
    ("jobset", {"conditions": [condition("Failed", "FailJobSetFailurePolicyAction", "job big-1-node-0 failed")]}, {},
     "failed", "FailJobSetFailurePolicyAction: job big-1-node-0 failed"),
    ("trainjob", None, {}, "queued", "no controller has taken up the TrainJob yet"),
    ("trainjob", {"conditions": [condition("Suspended", "Suspended", "TrainJob is suspended")]}, {"suspend": True},
     "queued", "Suspended: TrainJob is suspended"),
    ("trainjob", {"jobsStatus": parts(active=1)}, {}, "starting", "its pods are being made ready"),
    ("trainjob", {"jobsStatus": parts(active=1, ready=1)}, {}, "running", ""),
    ("trainjob", {"conditions": [condition("Complete", "AllJobsCompleted", "done")]}, {}, "finished",
     "AllJobsCompleted: done"),
    ("trainjob", {"conditions": [condition("Failed", "DeadlineExceeded", "too long")]}, {}, "failed",
     "DeadlineExceeded: too long"),
    ("rayjob", None, {}, "queued", "no controller has taken up the RayJob yet"),
    ("rayjob", None, {"suspend": True}, "queued", "suspended"),
    ("rayjob", {"jobDeploymentStatus": "Suspended"}, {"suspend": True}, "queued", "Suspended"),
    ("rayjob", {"jobDeploymentStatus": "Initializing"}, {}, "starting", "Initializing"),
    ("rayjob", {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, {}, "starting", "Running PENDING"),
    ("rayjob", {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, {}, "running", "Running RUNNING"),
    ("rayjob", {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, {}, "finished", "Complete SUCCEEDED"),
    ("rayjob", {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, {}, "cancelled", "Complete STOPPED"),
    ("rayjob", {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "code 1"}, {},
     "failed", "Failed FAILED (AppFailed: code 1)"),
    ("rayjob", {"jobDeploymentStatus": "ValidationFailed", "message": "bad name"}, {}, "failed",
     "ValidationFailed (bad name)"),
    ("rayjob", {"jobDeploymentStatus": "Suspending", "jobStatus": "RUNNING"}, {"suspend": True},
     "preempted-will-return", "Suspending RUNNING"),
    ("rayjob", {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, {}, "preempted-will-return",
     "Retrying FAILED"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "status", "spec", "state", "reason"), STATES)
def test_conditions_become_one_of_our_states_with_the_operators_words(
    api: ApiServer, kind: str, status: dict[str, Any] | None, spec: dict[str, Any], state: str, reason: str
):
    put(api, kind, status, **spec)
    found = kubernetes.status(job_of(kind))
    assert (found.state, found.reason) == (state, reason)


@pytest.mark.skipif(CRD_DIR not in os.environ, reason=f"{CRD_DIR} names no folder with CRDs")
@pytest.mark.parametrize(("kind", "status", "spec", "state", "reason"), STATES)
def test_the_statuses_that_the_fake_is_given_are_such_as_operators_write(
    kind: str, status: dict[str, Any] | None, spec: dict[str, Any], state: str, reason: str
):
    from launcher.jobs.targets.kubernetes_validation import FILES, crd_complaints

    job = thing(kind, status, **spec)
    if kind == "trainjob":
        job["spec"]["runtimeRef"] = {"name": "torch-distributed"}
    assert list(crd_complaints(job, Path(os.environ[CRD_DIR], FILES[job["kind"]]))) == []


def test_the_nodes_of_running_pods_are_named_in_their_order(api: ApiServer):
    put(api, "jobset", {"replicatedJobsStatus": parts(active=1, ready=1)})
    for rank, node in ((1, "gpu-b"), (0, "gpu-a")):
        api.put("pods", pod(rank, node=node))
    assert kubernetes.status(job_of("jobset")).nodes == "gpu-a,gpu-b"


def test_a_ray_jobs_nodes_are_those_of_its_cluster(api: ApiServer):
    put(api, "rayjob", {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "big-1-x7k2p"})
    api.put("pods", pod(0, node="gpu-a", labels={"ray.io/cluster": "big-1-x7k2p"}))
    api.put("pods", pod(1, node="gpu-z", labels={"ray.io/cluster": "another"}))
    assert kubernetes.status(job_of("rayjob")).nodes == "gpu-a"


def test_a_pod_that_no_node_takes_says_why(api: ApiServer):
    put(api, "jobset", {"replicatedJobsStatus": parts(active=1)})
    why = condition("PodScheduled", "Unschedulable", "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.", "False")
    api.put("pods", pod(0, conditions=[why]))
    found = kubernetes.status(job_of("jobset"))
    assert found.state == "queued"
    assert found.reason == (
        "big-1-node-0-0-abcde: Unschedulable: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu."
    )


def test_a_container_that_cannot_start_says_why(api: ApiServer):
    put(api, "jobset", {"replicatedJobsStatus": parts(active=1)})
    waits = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "team/launcher:1"'}
    api.put("pods", pod(0, node="gpu-a", containerStatuses=[{"name": "node", "state": {"waiting": waits}}]))
    found = kubernetes.status(job_of("jobset"))
    assert found.state == "starting"
    assert found.reason == 'big-1-node-0-0-abcde: ImagePullBackOff: Back-off pulling image "team/launcher:1"'


@pytest.mark.parametrize(
    ("conditions", "state", "reason"),
    [
        ([condition("QuotaReserved", "Pending", "insufficient unused quota for gpu", "False")], "queued",
         "Pending: insufficient unused quota for gpu"),
        ([condition("QuotaReserved", "Pending", "waits", "False"),
          condition("Evicted", "Preempted", "Preempted to accommodate a workload")], "preempted-will-return",
         "Preempted: Preempted to accommodate a workload"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", NAMES)
def test_a_job_that_kueue_holds_back_says_so_in_kueues_words(
    api: ApiServer, kind: str, conditions: list[dict[str, str]], state: str, reason: str
):
    job = put(api, kind, {"jobDeploymentStatus": "Suspended"} if kind == "rayjob" else {}, suspend=True)
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    labels = {"kueue.x-k8s.io/job-uid": "uid-of-big-1"}
    api.put("workloads", {"metadata": {"name": "w", "labels": labels}, "status": {"conditions": conditions}})
    found = kubernetes.status(job_of(kind))
    assert (found.state, found.reason) == (state, reason)


def test_a_user_who_may_not_look_at_pods_still_learns_the_state(api: ApiServer):
    put(api, "jobset", {"replicatedJobsStatus": parts(active=1, ready=1)})
    api.refusals["GET", "pods"] = (403, "pods is forbidden")
    assert kubernetes.status(job_of("jobset")).state == "running"


def test_a_job_that_is_being_deleted_counts_until_its_pods_have_ended():
    job = thing("jobset", {"conditions": [SUSPENDED]})
    job["metadata"]["deletionTimestamp"] = "2026-11-21T12:00:00Z"
    assert status_of(job).state == "running"
    assert "time for a checkpoint" in status_of(job).reason


def test_a_job_that_is_gone_is_unknown_and_says_where_to_look(api: ApiServer):
    found = kubernetes.status(job_of("jobset"))
    assert found.state == "unknown"
    assert found.reason.startswith("JobSet big-1 is not in namespace team-a: deleted, or removed after its end")
    assert found.reason.endswith("/shared/runs/big")


# logs


def test_logs_are_the_pods_lines_node_0_first_each_with_its_pod(api: ApiServer):
    put(api, "jobset")
    for rank in (1, 0):
        api.put("pods", pod(rank))
    api.logs = {"big-1-node-0-0-abcde": "step 1\nstep 2\n"}
    assert list(kubernetes.logs(job_of("jobset"))) == [
        "big-1-node-0-0-abcde: step 1",
        "big-1-node-0-0-abcde: step 2",
        "big-1-node-0-1-abcde: (no log: container of big-1-node-0-1-abcde is waiting to start.)",
    ]


def test_the_log_of_a_ray_job_is_its_drivers_without_prefix(api: ApiServer):
    put(api, "rayjob")
    api.put("pods", pod(0, labels={"batch.kubernetes.io/job-name": "big-1"}))
    api.logs = {"big-1-node-0-0-abcde": "driver\n"}
    assert list(kubernetes.logs(job_of("rayjob"))) == ["driver"]


def test_logs_of_a_job_without_pods_say_how_it_stands_and_where_the_ranks_logs_are(api: ApiServer):
    put(api, "jobset", {"conditions": [SUSPENDED]}, suspend=True)
    with pytest.raises(UserError, match=r"has no pods .*\(queued: SuspendedJobs.*/shared/runs/big/logs, on the claim"):
        list(kubernetes.logs(job_of("jobset")))


# cancel


@pytest.mark.parametrize("kind", NAMES)
def test_cancel_deletes_the_job_in_the_foreground(api: ApiServer, kind: str):
    put(api, kind)
    kubernetes.cancel(job_of(kind))
    assert f"DELETE {KINDS[kind].plural} propagationPolicy=Foreground" in api.asked
    assert not [key for key in api.objects if key[0] == KINDS[kind].plural]


def test_cancel_of_a_job_that_is_gone_says_so(api: ApiServer):
    with pytest.raises(UserError, match=r"JobSet big-1 is not in namespace team-a: there is nothing to cancel"):
        kubernetes.cancel(job_of("jobset"))


def test_cancel_that_is_forbidden_passes_the_reason_on(api: ApiServer):
    put(api, "jobset")
    api.refusals["DELETE", "jobsets"] = (403, "jobsets is forbidden: User me cannot delete resource")
    with pytest.raises(UserError, match=r"refused \(403 Forbidden\): jobsets is forbidden: User me cannot delete"):
        kubernetes.cancel(job_of("jobset"))


# the whole way, by the command line


RECIPE = """\
model: {name: org/model}
data: {train: [{path: org/data}], seq_len: 128}
train: {global_batch_size: 16, max_steps: 5}
run: {name: big, dir: /shared/runs}
cluster:
  target: kubernetes
  nodes: 2
  nproc_per_node: 8
  kubernetes: {image: team/launcher:1, claim: runs}
"""


def launcher(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    from launcher.cli import main

    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    said = capsys.readouterr()
    return int(exit.value.code or 0), said.out + said.err


@pytest.mark.parametrize("kind", NAMES)
def test_submit_status_logs_and_cancel_from_a_machine_that_does_not_see_the_run(
    api: ApiServer, tmp_path: Path, monkeypatch, capsys, kind: str
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code, said = launcher(capsys, "submit", "recipe.yaml", f"cluster.kubernetes.kind={kind}", "--json")
    assert code == 0, said
    assert json.loads(said)["id"] == "big-1"
    files = tmp_path / "state/launcher/runs/big/job/submission-1"
    assert {path.name for path in files.iterdir()} >= {"job.yaml", "recipe.yaml", "plan.json"}

    job = api.objects[KINDS[kind].plural, "team-a", "big-1"]
    job["status"] = {
        "jobset": {"replicatedJobsStatus": parts(active=1, ready=1)},
        "trainjob": {"jobsStatus": parts(active=1, ready=1)},
        "rayjob": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
    }[kind]
    code, said = launcher(capsys, "submit", "recipe.yaml", f"cluster.kubernetes.kind={kind}")
    assert (code, "kubernetes job big-1 is running" in said) == (2, True), said
    code, said = launcher(capsys, "cancel", "big")
    assert code == 0, said
    assert (KINDS[kind].plural, "team-a", "big-1") not in api.objects
    code, said = launcher(capsys, "submit", "recipe.yaml", f"cluster.kubernetes.kind={kind}")
    assert code == 0, said
    assert (KINDS[kind].plural, "team-a", "big-2") in api.objects


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe for the server."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


SWEEP = ("recipe.yaml", "--sweep", "optimizer.lr=1e-5,3e-5")
SWEPT = ("big-lr-1e-5", "big-lr-3e-5")


@pytest.mark.parametrize("kind", NAMES)
def test_a_sweep_is_a_job_for_each_run_as_render_shows_them(api: ApiServer, here: Path, capsys, kind: str):
    arguments = [*SWEEP, f"cluster.kubernetes.kind={kind}"]
    code, said = launcher(capsys, "render", *arguments, "--json")
    shown = json.loads(said)["jobs"]
    assert (code, [(job["runs"], job["folder"]) for job in shown]) == (0, [([name], name) for name in SWEPT])
    code, said = launcher(capsys, "render", *arguments, "-o", "jobs")
    assert code == 0, said
    assert [line for line in said.splitlines() if line.startswith("(")] == [
        f"(cd jobs/{name} && kubectl create -f job.yaml)" for name in SWEPT
    ]
    assert not [request for request in api.asked if request.startswith("POST")]

    code, said = launcher(capsys, "submit", *arguments, "--json")
    assert code == 0, said
    submitted = json.loads(said)["runs"]
    assert [(one["run"], one["id"]) for one in submitted] == [(name, f"{name}-1") for name in SWEPT]
    for one, job in zip(submitted, shown, strict=True):
        assert (KINDS[kind].plural, "team-a", one["id"]) in api.objects
        for folder in (Path(one["folder"]), here / "jobs" / one["run"]):
            assert {file: (folder / file).read_text() for file in job["files"]} == job["files"]
        config = api.objects["configmaps", "team-a", one["id"]]["data"]["recipe.yaml"]
        assert json.loads(config.partition("\n")[2])["optimizer"]["lr"] == float(one["run"].removeprefix("big-lr-"))


def test_a_sweep_prints_every_file_of_every_job(api: ApiServer, here: Path, capsys):
    _, said = launcher(capsys, "render", *SWEEP)
    for name in SWEPT:
        for part in ("/recipe.yaml", "/job.yaml", ": environment", ": validation", ": command"):
            assert f"==> {name}{part} <==\n" in said


def test_a_sweep_with_a_run_that_is_queued_hands_nothing_over(api: ApiServer, here: Path, capsys):
    launcher(capsys, "submit", "recipe.yaml", "run.name=big-lr-3e-5", "optimizer.lr=3e-5")
    before = dict(api.objects)
    code, said = launcher(capsys, "submit", *SWEEP)
    assert (code, "big-lr-3e-5 is submitted already: kubernetes job big-lr-3e-5-1 is" in said) == (2, True), said
    assert api.objects == before


def test_a_sweep_that_is_refused_on_its_way_names_what_is_queued(api: ApiServer, here: Path, capsys):
    put = api.put("jobsets", {"metadata": {"name": "big-lr-3e-5-1"}})  # somebody else's
    code, said = launcher(capsys, "submit", *SWEEP)
    assert code == 2
    assert said.startswith("big-lr-3e-5: ")
    assert said.endswith(
        "\nSubmitted before it, and left so; launcher cancel NAME ends one:\n"
        "  big-lr-1e-5: kubernetes job big-lr-1e-5-1\n"
    )
    assert api.objects["jobsets", "team-a", "big-lr-3e-5-1"] is put
    assert not (here / "state/launcher/runs/big-lr-3e-5").exists()
    assert launcher(capsys, "cancel", "big-lr-1e-5")[0] == 0


def test_the_names_of_a_sweep_are_such_as_kubernetes_takes(here: Path, capsys):
    code, said = launcher(capsys, "render", *SWEEP, f"run.name={'x' * 40}", "--json")
    assert code == 0, said
    assert [job["folder"] for job in json.loads(said)["jobs"]] == [f"{'x' * 40}-0", f"{'x' * 40}-1"]


def test_crds_are_for_target_kubernetes_alone(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CRD_DIR, "elsewhere")  # --crds comes before it
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    where = ["render", "recipe.yaml", "cluster.target=torchrun", "run.dir=runs", "--crds", "crds"]
    code, said = launcher(capsys, *where)
    assert (code, said) == (2, "--crds crds: only target kubernetes has CRDs, this job is for torchrun.\n")
    code, said = launcher(capsys, *where, "--sweep", "train.seed=1,2")
    assert (code, said) == (2, "--crds crds: only target kubernetes has CRDs, this job is for torchrun.\n")
    code, said = launcher(capsys, "render", "recipe.yaml", "--crds", "crds")
    assert (code, said) == (2, "--crds crds: expected a folder with CustomResourceDefinitions (LAUNCHER_CRD_DIR).\n")
