"""The containers of a rendered JobSet, run as a kubelet would: commands, environment and DNS names of the manifest.

Each pod is a network namespace in which the names that a JobSet gives its pods resolve; the test plays the JobSet
controller, which starts every pod again after an exit code that is not in the podFailurePolicy.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.spec import job_spec
from launcher.jobs.targets import kubernetes, problems
from launcher.jobs.targets.kubernetes_validation import read
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.jobs.make import finish, launcher, losses, project, run_of, tensors_of, until
from tests.netns import Machines

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

STEPS = 40


def manifest(recipe: Path, *changes: str) -> list[dict[str, Any]]:
    """ConfigMap and JobSet of a project's recipe on two pods with a rank each, the project's folder being the claim."""
    k8s = [
        f"cluster.kubernetes.{change}" for change in ("image=team/launcher:1", "claim=runs", f"mount={recipe.parent}")
    ]
    two = ["cluster.target=kubernetes", "cluster.nodes=2", "cluster.nproc_per_node=1"]
    loaded = load(recipe, [*two, *k8s, *changes], rules=[problems]).recipe
    return read(kubernetes.render(job_spec(loaded, make_plan(loaded))).files["job.yaml"])


def start(
    machines: Machines, job: list[dict[str, Any]], folder: Path, *, restart: int = 0
) -> list[subprocess.Popen[str]]:
    """The JobSet's pods: its container on each machine, with the recipe of the ConfigMap."""
    config, job_set = job
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    (container,) = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    file = folder / f"{name}.yaml"
    file.write_text(config["data"]["recipe.yaml"])
    domain = spec["network"]["subdomain"]
    with machines._hosts.open("a") as names:  # what the JobSet's headless Service does
        names.writelines(f"{address} {name}-node-0-{i}.{domain}\n" for i, address in enumerate(machines.addresses))
    pods = []
    for index in range(spec["replicatedJobs"][0]["template"]["spec"]["completions"]):
        fields = {
            "metadata.labels['jobset.sigs.k8s.io/restart-attempt']": str(restart),
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
        }
        env = {
            v["name"]: v["value"] if "value" in v else fields[v["valueFrom"]["fieldRef"]["fieldPath"]]
            for v in container["env"]
        }
        command = [str(file) if word == "/etc/launcher/recipe.yaml" else word for word in container["command"]]
        assert command.pop(0) == "launcher"
        env |= {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        pods.append(machines.launcher(index, *command, env=env))
    return pods


def ends_the_job(job: list[dict[str, Any]], code: int) -> bool:
    """Whether the podFailurePolicy takes an exit code for the end of the whole JobSet."""
    rules = job[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    return any(code in rule.get("onExitCodes", {}).get("values", []) for rule in rules)


def test_a_jobset_whose_pod_is_evicted_starts_again_and_learns_what_one_node_learns(machines, tmp_path: Path):
    recipe = project(tmp_path, train={"max_steps": STEPS}, checkpoint={"every_steps": None})
    finish(launcher("run", recipe, "run.name=local"), code=0)
    job, run = manifest(recipe), run_of(recipe)

    pods = start(machines, job, tmp_path)
    until("some steps", lambda: len(losses(run)) >= 3 or any(pod.poll() is not None for pod in pods))
    pods[1].send_signal(signal.SIGTERM)
    said = [pod.communicate(timeout=240) for pod in pods]
    assert [pod.returncode for pod in pods] == [75, 75], said
    assert not ends_the_job(job, 75)
    assert read_state(run).status == "preempted"

    for pod in start(machines, job, tmp_path, restart=1):
        finish(pod, code=0)
    assert read_state(run).status == "finished"
    assert [(a.target, a.job_id, a.restart) for a in attempts(run)] == [
        ("kubernetes", "tiny-1", 0),
        ("kubernetes", "tiny-1", 1),
    ]
    local = run_of(recipe, "local")
    assert losses(run) == losses(local)
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(local)[-1].path)


def test_the_users_mistake_ends_the_jobset_on_every_pod(machines, tmp_path: Path):
    recipe = project(tmp_path)
    job = manifest(recipe, f"data.train=[{{path: {tmp_path}/lost.jsonl}}]", "run.name=wrong")
    pods = start(machines, job, tmp_path)
    said = [pod.communicate(timeout=240) for pod in pods]
    assert all(ends_the_job(job, pod.returncode) for pod in pods), said
    assert any("lost.jsonl: expected a file or folder that exists" in err for _, err in said), said
