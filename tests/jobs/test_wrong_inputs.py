"""What a person may do wrong on the launch side: each is answered with code 2, key, value, what is expected and a fix,
by the command line itself, without a traceback, before anything is queued or written.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli import main
from tests.jobs.make import finish, launcher, project

pytestmark = pytest.mark.slow

KUBERNETES = ["--target", "kubernetes", "run.dir=/shared/runs"]
PODS = [*KUBERNETES, "cluster.kubernetes.image=a/b:1", "cluster.kubernetes.claim=training", "model.tokenizer=org/name",
        "data.train=[{path: org/data}]", "data.cache_dir=null"]  # fmt: skip
SLURM = ["--target", "slurm"]
RAY = ["--target", "ray"]
HEAD = "cluster.ray.address=http://head:8265"
TWO = ["cluster.nodes=2", "cluster.nproc_per_node=2"]

Row = tuple[list[str], list[str]]  # arguments, with RECIPE for the recipe; what the answer holds

RECIPES: dict[str, Row] = {  # `launcher check`, and `launcher submit` alike
    "unknown target": (["cluster.target=slrm"], ["cluster.target = slrm", "slurm", "Did you mean 'slurm'?"]),
    "unknown target option": (["--target", "slrm"], ["slrm", "slurm", "kubernetes"]),
    "limit within lead": (
        [*SLURM, "cluster.time_limit_min=2", "cluster.stop_lead_s=120"],
        ["cluster.time_limit_min = 2", "120 s of cluster.stop_lead_s", "Use at least"],
    ),
    "limit within lead and save time": (
        [*SLURM, "cluster.time_limit_min=2", "cluster.stop_lead_s=115"],
        ["cluster.time_limit_min = 2", "that a checkpoint takes", "Use at least"],
    ),
    "lead beyond what Slurm takes": (["cluster.stop_lead_s=70000"], ["cluster.stop_lead_s = 70000", "65535"]),
    "no lead": (["cluster.stop_lead_s=0"], ["cluster.stop_lead_s = 0", "1 to 65535"]),
    "value in env": (["cluster.env=[HF_TOKEN=hf_abc]"], ["cluster.env = HF_TOKEN=...", "never its value"]),
    "preflight off": (["cluster.preflight=off"], ["cluster.preflight = off", "true or false"]),
    "no join": (["cluster.join_timeout_s=0"], ["cluster.join_timeout_s = 0", "1 second or more"]),
    "interfaces": (["cluster.network_interface=eth0,eth1"], ["cluster.network_interface = eth0,eth1", "one interface"]),
    "negative budget": (["cluster.restart.node=-1"], ["cluster.restart.node = -1", "0 or more"]),
    "no start at all": (["cluster.restart.no_progress=0"], ["cluster.restart.no_progress = 0", "1 or more"]),
    "unknown class": (["cluster.restart.oom=3"], ["cluster.restart.oom", "node"]),
    "run in a machine's memory": ([*TWO, "run.dir=/dev/shm/runs"], ["run.dir = /dev/shm/runs", "all 2 nodes share"]),
    "copied code in pods": ([*PODS, "cluster.snapshot=true"], ["cluster.snapshot = true", "cluster.kubernetes.image"]),
    "copied code on a Ray cluster": (
        [*RAY, HEAD, "cluster.snapshot=true"], ["cluster.snapshot = true", "cluster.ray.working_dir"]
    ),
    "copied code in a container": (
        [*SLURM, "cluster.snapshot=true", "cluster.slurm.container={runtime: pyxis, image: a.sqsh}"],
        ["cluster.snapshot = true", "whose image holds the code"],
    ),
    # Slurm
    "name too long for Slurm": ([*SLURM, f"run.name={'x' * 201}"], ["run.name = xxx", "at most 200"]),
    "name with a space": ([*SLURM, "run.name=my run"], ["run.name = my run", "letters, digits"]),
    "GRES of other count": ([*SLURM, "cluster.slurm.gres=gpu:a100:4"], ["cluster.slurm.gres = gpu:a100:4", "2 GPUs"]),
    "GRES without GPUs": ([*SLURM, "cluster.slurm.gres=shard:2"], ["cluster.slurm.gres = shard:2", "gpu:2"]),
    "fewer cores than ranks": ([*SLURM, "cluster.slurm.cpus_per_node=1"], ["cluster.slurm.cpus_per_node = 1", "2 or"]),
    "cores that do not divide": (
        [*SLURM, "cluster.slurm.tasks=gpu", "cluster.slurm.cpus_per_node=5"],
        ["cluster.slurm.cpus_per_node = 5", "a multiple of 2", "Nearest: 4"],
    ),
    "an option that a key decides": (
        [*SLURM, "cluster.slurm.extra=[--nodes=4]"], ["cluster.slurm.extra", "--nodes=4", "cluster.nodes"]
    ),
    "a shell variable in an option": (
        [*SLURM, "cluster.slurm.partition=$QUEUE"], ["cluster.slurm.partition = $QUEUE"]
    ),
    "memory in words": ([*SLURM, "cluster.slurm.mem=all"], ["cluster.slurm.mem = all"]),
    "container without image": (
        [*SLURM, "cluster.slurm.container.runtime=pyxis"], ["cluster.slurm.container.image = null", "an image"]
    ),
    "a task a GPU in a container": (
        [*SLURM, "cluster.slurm.tasks=gpu", "cluster.slurm.container={runtime: apptainer, image: a.sif}"],
        ["cluster.slurm.tasks = gpu", "node"],
    ),
    "unknown key of Slurm": ([*SLURM, "cluster.slurm.queue=gpu"], ["cluster.slurm.queue", "Did you mean"]),
    # Ray
    "the address of Ray's own protocol": (
        [*RAY, "cluster.ray.address=ray://head:10001"], ["cluster.ray.address = ray://head:10001", "http://"]
    ),
    "an address without http": ([*RAY, "cluster.ray.address=head:6379"], ["cluster.ray.address = head:6379", "http://"]),
    "two nodes on a cluster of this machine": (
        [*RAY, *TWO, "cluster.ray.address=local"], ["cluster.nodes = 2", "cluster.ray.address"]
    ),
    "a working directory that is not there": (
        [*RAY, HEAD, "cluster.ray.working_dir=/nowhere"], ["cluster.ray.working_dir = /nowhere", "exists"]
    ),
    "no cores for an agent": ([*RAY, HEAD, "cluster.ray.cpus_per_node=0"], ["cluster.ray.cpus_per_node = 0", "1 core"]),
    # Kubernetes
    "no image": ([*KUBERNETES, "cluster.kubernetes.claim=c"], ["cluster.kubernetes.image = null", "a container image"]),
    "no claim": ([*KUBERNETES, "cluster.kubernetes.image=a/b:1"], ["cluster.kubernetes.claim = null", "ReadWriteMany"]),
    "no secret": (
        [*PODS, "cluster.env=[HF_TOKEN]"], ["cluster.kubernetes.secret = null", "HF_TOKEN", "kubectl create secret"]
    ),
    "an image that is none": ([*PODS, "cluster.kubernetes.image=a b"], ["cluster.kubernetes.image = a b", "ghcr.io"]),
    "a run outside of the claim": ([*PODS, "run.dir=/home/me/runs"], ["run.dir = ", "below cluster.kubernetes.mount"]),
    "data that pods do not see": ([*PODS, "data.train=[{path: /me/x.jsonl}]"], ["data.train.0.path = ", "pods see"]),
    "name too long for pods": ([*PODS, f"run.name={'x' * 60}"], ["run.name = xxx", "at most", "Use run.name="]),
    "a label that is none": ([*PODS, "cluster.kubernetes.labels={team: 'a b'}"], ["cluster.kubernetes.labels", "a b"]),
    "shm larger than memory": (
        [*PODS, "cluster.kubernetes.memory=8Gi"], ["cluster.kubernetes.shm = 16Gi", "at most cluster.kubernetes.memory"]
    ),
    "a time to live of a TrainJob": (
        [*PODS, "cluster.kubernetes.kind=trainjob", "cluster.kubernetes.ttl_s=60"], ["cluster.kubernetes.ttl_s = 60"]
    ),
    "topology without a queue": (
        [*PODS, "cluster.kubernetes.topology=topology.kubernetes.io/zone"], ["cluster.kubernetes.topology", "queue"]
    ),
    "memory in no unit": ([*PODS, "cluster.kubernetes.memory=8GB"], ["cluster.kubernetes.memory = 8GB"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two ranks on GPUs, as jobs for schedulers have."""
    return project(tmp_path_factory.mktemp("project"), cluster={"accelerator": "auto"})


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path) -> Iterator[Path]:
    """A Slurm that notes what it is given, and refuses some of it in Slurm's words; nothing may be noted in the end."""
    tools, noted = tmp_path / "tools", tmp_path / "queued"
    tools.mkdir()
    (tools / "sbatch").write_text(_SBATCH.replace("NOTED", str(noted)))
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("LAUNCHER_CLUSTER", "RAY_ADDRESS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield noted
    assert not noted.exists(), "something was queued"
    left = [path for path in (recipe.parent / "runs").rglob("*") if path.is_file()]
    shutil.rmtree(recipe.parent / "runs", ignore_errors=True)
    assert {path.name for path in left} <= {"verdict"}, left  # the word for a scheduler that has started a node
    assert not (tmp_path / "state").exists() or not list((tmp_path / "state").rglob("submissions.jsonl"))


_SBATCH = """#!/bin/bash
refuse() { echo "sbatch: error: $1" >&2; echo "allocation failure: $2" >&2; exit 1; }
asked() { grep -q -e "$1" job.sbatch; }
asked --partition=nosuch && refuse 'invalid partition specified: nosuch' 'Invalid partition name specified'
asked --gpus-per-node && refuse 'Batch job submission failed' 'Invalid generic resource (gres) specification'
[[ $* == *--test-only* ]] && exit 0
touch NOTED; echo 7
"""


def answered(code: int, out: str, err: str, needles: list[str]) -> None:
    assert code == 2, out + err
    for needle in needles:
        assert needle in err or needle in out, f"{needle!r} is not in: {err or out}"
    assert "Traceback" not in err + out
    assert len((err or out).strip().splitlines()) < 25


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize("verb", ["check", "submit"])
@pytest.mark.parametrize("row", RECIPES.values(), ids=RECIPES)
def test_a_wrong_recipe_is_answered_before_anything_is_queued(recipe, queue, capsys, row, verb):
    arguments, needles = row
    code, out, err = answer([verb, str(recipe), *arguments], capsys)
    answered(code, out, err, needles)
    if "=" in needles[0]:
        assert re.search(r": expected .+", err), err
    assert "hf_abc" not in err + out


SUBMITTED: dict[str, Row] = {  # what only the place where it is submitted knows
    "unknown partition": (
        [*SLURM, "cluster.accelerator=cpu", "cluster.slurm.partition=nosuch"],
        ["sbatch --test-only", "nosuch", "cluster.slurm.partition"],
    ),
    "GPUs that Slurm does not know": (SLURM, ["generic resource", "cluster.slurm.gres"]),
    "a variable that is not set, for Slurm": (
        [*SLURM, "cluster.accelerator=cpu", "cluster.env=[HF_TOKEN]"], ["cluster.env", "HF_TOKEN not set"]
    ),
    "a variable that is not set, here": (["cluster.env=[HF_TOKEN]"], ["cluster.env", "HF_TOKEN", "Export it"]),
    "several nodes by torchrun": ([*TWO, "--target", "torchrun"], ["cluster.nodes = 2", "this machine only"]),
    "several nodes by accelerate": ([*TWO, "--target", "accelerate"], ["cluster.nodes = 2", "this machine only"]),
    "no address of Ray": (RAY, ["cluster.ray.address = null", "RAY_ADDRESS is not set", "http://HOST:8265"]),
    "an unreachable head": (
        [*RAY, "cluster.ray.address=http://127.0.0.1:1"], ["http://127.0.0.1:1", "cluster.ray.address"]
    ),
    "a sweep of nothing": (["--sweep", "optimizer.lr", *SLURM], ["--sweep optimizer.lr", "expected KEY=VALUE"]),
    "a sweep of names": (["--sweep", "run.name=a,b", *SLURM], ["--sweep run.name=a,b", "a key of the training"]),
    "a sweep with a wrong value": (["--sweep", "optimizer.lr=1e-3,fast", *SLURM], ["optimizer.lr = fast", "a number"]),
    "a sweep by torchrun": (["--sweep", "optimizer.lr=1e-3,1e-4", "--target", "torchrun"], ["torchrun", "slurm"]),
}  # fmt: skip


@pytest.mark.parametrize("row", SUBMITTED.values(), ids=SUBMITTED)
def test_a_wrong_submission_is_answered_before_anything_is_queued(recipe, queue, capsys, row):
    arguments, needles = row
    answered(*answer(["submit", str(recipe), *arguments], capsys), needles)


def test_without_sbatch_the_way_to_a_login_node_is_shown(recipe, queue, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    said = answer(["submit", str(recipe), *SLURM, "cluster.accelerator=cpu"], capsys)
    answered(*said, ["sbatch: not on PATH", "login node", "launcher render"])


def test_without_ray_the_command_that_installs_it_is_shown(recipe, queue, capsys, monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    said = answer(["submit", str(recipe), *RAY, "cluster.ray.address=local"], capsys)
    answered(*said, ["needs Ray", "train-launcher[ray]"])


OTHERS: dict[str, Row] = {
    "no recipe": (["submit", "nowhere.yaml"], ["nowhere.yaml"]),
    "neither recipe nor run": (["submit", "nowhere"], ["'nowhere' is neither a recipe nor a run"]),
    "cancel of no run": (["cancel", "nowhere"], ["no run 'nowhere'"]),
    "status of no run": (["status", "nowhere"], ["no run 'nowhere'"]),
    "logs of no run": (["logs", "nowhere", "--job"], ["no run 'nowhere'"]),
    "differences to no run": (["render", "RECIPE", "--diff", "nowhere"], ["no run 'nowhere'"]),
    "differences and reasons": (["render", "RECIPE", "--diff", "a", "--explain"], ["--diff", "--explain"]),
    "CRDs of another target": (["render", "RECIPE", "--crds", "."], ["--crds", "kubernetes", "torchrun"]),
    "a folder that is a file": (["render", "RECIPE", "-o", "RECIPE"], ["-o", "cannot be written"]),
}


@pytest.mark.parametrize("row", OTHERS.values(), ids=OTHERS)
def test_a_wrong_command_is_answered(recipe, queue, capsys, row):
    arguments, needles = row
    answered(*answer([str(recipe) if word == "RECIPE" else word for word in arguments], capsys), needles)


MET = ["--nodes", "2", "--rendezvous", "127.0.0.1:29400"]
STARTED: dict[str, tuple[list[str], dict[str, str], list[str]]] = {  # `launcher run` and `launcher worker`
    "no such node": ([*MET, "--node-rank", "2"], {}, ["--node-rank 2", "expected 0 to 1"]),
    "a negative node": ([*MET, "--node-rank", "-1"], {}, ["--node-rank -1", "expected 0 to 1"]),
    "which node": (MET, {}, ["--node-rank: missing in a job of 2 nodes", "expected 0 to 1"]),
    "no node at all": (["--nodes", "0"], {}, ["--nodes 0", "1 or more"]),
    "no rendezvous": (["--nodes", "2", "--node-rank", "0"], {}, ["--rendezvous: missing", "HOST:PORT"]),
    "a rendezvous without port": (
        ["--nodes", "2", "--node-rank", "0", "--rendezvous", "host"], {}, ["--rendezvous host", "HOST:PORT"]
    ),
    "a port beyond all": (
        ["--nodes", "2", "--node-rank", "0", "--rendezvous", "127.0.0.1:70000"], {}, ["--rendezvous 127.0.0.1:70000"]
    ),
    "auto without a scheduler": (
        ["--rendezvous", "auto"], {}, ["--rendezvous auto", "SLURM_JOB_ID", "PET_NNODES", "JOB_COMPLETION_INDEX"]
    ),
    "a restart that is no number": (
        [], {"LAUNCHER_JOB_ID": "7", "LAUNCHER_JOB_RESTART": "twice"}, ["LAUNCHER_JOB_RESTART = twice"]
    ),
    "one process of two nodes": (
        [], {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, ["Slurm job 7 on 2 nodes", "srun --ntasks-per-node=1"]
    ),
    "two tasks on a node": (
        [],
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "2"},
        ["2 tasks on 1 node", "--ntasks-per-node=1"],
    ),
    "an elastic Kubeflow job": (
        [],
        {"PET_NNODES": "1:4", "PET_MASTER_ADDR": "a", "PET_NODE_RANK": "0"},
        ["PET_NNODES = 1:4", "one number of nodes"],
    ),
    "an indexed job without a place to meet": (
        ["--nodes", "2"], {"JOB_COMPLETION_INDEX": "1"}, ["--rendezvous: missing in a job of 2 nodes"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "environment", "needles"), STARTED.values(), ids=STARTED)
def test_a_wrong_start_of_a_node_is_answered(recipe, queue, options, environment, needles):
    process = launcher("worker", recipe.parent / "runs" / "tiny", "--recipe", recipe, *options, env=environment)
    out, err = finish(process, code=2)
    answered(2, out, err, needles)


def test_a_port_that_is_taken_is_named(recipe, queue):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--nodes", "2", "--node-rank", "0", "--rendezvous", place]
        process = launcher("worker", recipe.parent / "runs" / "tiny", "--recipe", recipe, *options)
        out, err = finish(process, code=2)
    answered(2, out, err, [f"--rendezvous {place}", "taken"])


def test_several_nodes_by_run_alone_names_the_ways(recipe, queue):
    out, err = finish(launcher("run", recipe, *TWO), code=2)
    answered(2, out, err, ["cluster.nodes = 2", "--node-rank", "launcher submit"])
