"""L12: a target is a pure function from a job spec to text; the text is compared whole."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.jobs.spec import JobSpec, job_spec, stop_after_s
from launcher.jobs.targets import render
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.schema import Cluster
from launcher.shipped import folder

BY_HAND = ("torchrun", "accelerate")  # a script a node
GOLDEN = Path(__file__).parent / "golden"

ONE_NODE = JobSpec(
    name="tiny", run="/runs/with space/tiny", cluster=Cluster(nproc_per_node=2),
    files={"recipe.yaml": "{}\n"},
)  # fmt: skip
TWO_NODES = JobSpec(
    name="big", run="/shared/runs/big", env={"NCCL_DEBUG": "WARN", "MESSAGE": "it's"},
    files={"recipe.yaml": "{}\n"},
    cluster=Cluster(
        nodes=2, nproc_per_node=8, env=["WANDB_API_KEY", "HF_TOKEN"], time_limit_min=60,
        setup=["module load cuda/13", "source /opt/venv/bin/activate"],
    ),
)  # fmt: skip


def assert_golden(name: str, text: str) -> None:
    """Compare with the kept text; LAUNCHER_REFRESH_GOLDEN=1 keeps the new one instead, for a person to review."""
    file = GOLDEN / name
    if os.environ.get("LAUNCHER_REFRESH_GOLDEN") == "1":
        file.write_text(text)
    assert file.is_file(), f"{file} is missing"
    assert text == file.read_text()


def shellcheck(text: str) -> str:
    """What it says of a script; set-up lines name files that are elsewhere."""
    command = [str(Path(sys.executable).parent / "shellcheck"), "--shell=bash", "--exclude=SC1091", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True).stdout


def test_l12_torchrun_script_of_one_node_matches_golden():
    rendered = render(ONE_NODE, target="torchrun")
    assert set(rendered.files) == {"recipe.yaml", "job.sh"}
    assert_golden("torchrun-1x2.sh", rendered.files["job.sh"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=zero2", "cluster.accelerator=cpu"], {"DS_ACCELERATOR": "cpu"}),
        (["strategy=zero2", "cluster.accelerator=cuda"], {}),
        (["strategy=ddp", "cluster.accelerator=cpu"], {}),
    ],
)
def test_a_zero_job_on_the_cpu_tells_deepspeed_so_before_accelerate_imports_it(overrides, expected):
    recipe = load(folder("recipes") / "tiny-cpu.yaml", overrides).recipe
    assert job_spec(recipe, make_plan(recipe)).env == expected


@pytest.mark.parametrize("node", [0, 1])
def test_l12_torchrun_scripts_of_two_nodes_match_golden(node):
    assert_golden(f"torchrun-2x8-node-{node}.sh", render(TWO_NODES, target="torchrun").files[f"node-{node}.sh"])


ACCELERATE = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_machines": 2, "num_processes": 16}


def test_l12_accelerate_script_of_one_node_matches_golden():
    rendered = render(replace(ONE_NODE, accelerate={"distributed_type": "MULTI_GPU"}), target="accelerate")
    assert set(rendered.files) == {"recipe.yaml", "accelerate.yaml", "job.sh"}
    assert rendered.files["accelerate.yaml"] == "distributed_type: MULTI_GPU\n"
    assert_golden("accelerate-1x2.sh", rendered.files["job.sh"])


@pytest.mark.parametrize("node", [0, 1])
def test_l12_accelerate_scripts_of_two_nodes_match_golden(node):
    files = render(replace(TWO_NODES, accelerate=ACCELERATE), target="accelerate").files
    assert_golden(f"accelerate-2x8-node-{node}.sh", files[f"node-{node}.sh"])
    assert_golden("accelerate-2x8.yaml", files["accelerate.yaml"])


@pytest.mark.parametrize("target", BY_HAND)
def test_every_script_is_one_that_bash_can_read(target):
    for spec in (ONE_NODE, TWO_NODES):
        for name, text in render(spec, target=target).files.items():
            if name.endswith(".sh"):
                assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
                assert shellcheck(text) == ""


@pytest.mark.parametrize("target", BY_HAND)
def test_each_node_is_told_whether_it_hosts_the_rendezvous(target):
    files = render(TWO_NODES, target=target).files
    assert "is_host=1" in files["node-0.sh"]
    assert "is_host=0" in files["node-1.sh"]


@pytest.mark.parametrize("target", BY_HAND)
def test_l12_rendering_twice_gives_the_same_text_and_never_a_secret(target, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-secret-value")
    first, second = render(TWO_NODES, target=target), render(TWO_NODES, target=target)
    assert first == second
    assert "the-secret-value" not in str(first)


def test_unknown_target_names_those_that_exist():
    with pytest.raises(
        UserError,
        match=r"--target torchrn: expected one of torchrun, accelerate, slurm, ray, kubernetes\. Did you mean 'torch",
    ):
        render(ONE_NODE, target="torchrn")


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 54), (10, 540), (50, 2700), (720, 42900)])
def test_stop_is_asked_a_tenth_before_the_limit_but_at_most_five_minutes(minutes, seconds):
    assert stop_after_s(Cluster(time_limit_min=minutes)) == seconds
