"""Settings of Accelerate that contradict a run are refused, and both sides are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.jobs.spec import job_spec
from launcher.jobs.targets import render
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.schema import to_dict
from launcher.run.directory import RunDirectory
from launcher.shipped import folder
from launcher.trainer.launch_check import contradictions, other_precision

RECIPE = folder("recipes") / "tiny-cpu.yaml"  # 2 ranks, global batch 8, micro-batch 1: 4 forwards a step
DDP = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP = {**DDP, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
MESH = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
PREFIX = "ACCELERATE_DEEPSPEED_"

CASES = [
    (["strategy=ddp"], DDP, None, None),
    (["strategy=ddp"], {}, None, None),
    (["strategy=ddp"], {"WORLD_SIZE": "1"}, None, None),  # plain torchrun with fewer ranks goes on
    (["strategy=ddp"], {**DDP, "WORLD_SIZE": "4"}, "num_processes (WORLD_SIZE) = 4", "nproc_per_node = 2"),
    (["strategy=ddp"], FSDP, "ACCELERATE_USE_FSDP = true", "strategy.kind = ddp"),
    (["strategy=ddp"], {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED = true", "strategy.kind = ddp"),
    (["strategy=fsdp2"], DDP, "ACCELERATE_USE_FSDP = (not set)", "strategy.kind = fsdp2"),
    (["strategy=zero2"], DDP, "ACCELERATE_USE_DEEPSPEED = (not set)", "strategy.kind = zero2"),
    (["strategy=fsdp2"], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM", "strategy.kind = fsdp2"),
    (["strategy=ddp", "train.precision=fp32"], {**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, "= bf16", "= fp32"),
    (["strategy=ddp", "train.precision=bf16"], DDP, "mixed_precision (ACCELERATE_MIXED_PRECISION) = no", "= bf16"),
    (["strategy=ddp", "train.precision=bf16"], {**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, None, None),
    (["strategy=ddp"], {**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, None, None),  # auto: the device settles it
    (["strategy=ddp"], {**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"}, "= fp16", "train.precision = auto"),
    (["strategy=ddp"], {**DDP, "ACCELERATE_MIXED_PRECISION": "fp8"}, "= fp8", "train.precision = auto"),
    (["strategy=ddp", "model.dtype=bf16"], {**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16", "model.dtype = bf16"),
    (["strategy=ddp"], {**DDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "= INDUCTOR", "model.compile = false"),
    (["strategy=ddp", "model.compile=true"], DDP, "ACCELERATE_DYNAMO_BACKEND) = NO", "model.compile = true"),
    (["strategy=fsdp2"], FSDP, None, None),
    (["strategy=fsdp2"], {**FSDP, "FSDP_VERSION": "1"}, "FSDP_VERSION = 1", "strategy.kind = fsdp2"),
    (["strategy=fsdp2"], {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS", "offload.params = none"),
    (["strategy=fsdp2-offload"], {**FSDP, "FSDP_OFFLOAD_PARAMS": "false"}, "= false", "offload.params = cpu"),
    (["strategy=fsdp2"], {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "RESHARD", "reshard_after_forward = true"),
    (["strategy=fsdp2"], {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "= true", "gradient_checkpointing = none"),
    (
        ["strategy=fsdp2", "model.gradient_checkpointing=full"],
        {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
        "CHECKPOINTING_OFFLOAD = true", "gradient_checkpointing = full",
    ),
    (["strategy=fsdp2", "strategy.shard=1"], FSDP, "parallelism_config = (not set)", "mesh.replicate = 2"),
    (["strategy=fsdp2"], {**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}, None, None),
    (
        ["strategy=fsdp2"],
        {**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
        "DP_REPLICATE_SIZE = 2", "mesh.replicate = 1",
    ),
    (["strategy=fsdp2"], MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE = 1", "mesh.shard = 2"),
    (
        ["strategy=fsdp2"], {**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        "PARALLELISM_CONFIG_TP_SIZE = 2", "axis TP = 1",
    ),
    (["strategy=zero2"], {**ZERO, f"{PREFIX}ZERO_STAGE": "2"}, None, None),
    (["strategy=zero2"], ZERO, None, None),  # 2 is Accelerate's default
    (["strategy=zero3"], ZERO, "ZERO_STAGE = 2", "stage of strategy.kind = 3"),
    (["strategy=zero2"], {**ZERO, f"{PREFIX}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "= cpu", "offload.optimizer = none"),
    (["strategy=zero2"], {**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "STEPS = 3", "steps of the plan = 4"),
    (["strategy=zero2"], {**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, None, None),
    (["strategy=zero2"], {**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "CLIPPING = 0.5", "max_grad_norm = 1.0"),
]  # fmt: skip


AUTO, NO = {"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "no"}
TOLD = [  # overrides, environment, what auto settled on, what is said
    ([], {}, "fp32", None),
    ([], AUTO, "bf16", None),
    ([], NO, "fp32", None),
    ([], AUTO, "fp32", "Accelerate's mixed_precision (ACCELERATE_MIXED_PRECISION) = bf16, but train.precision = auto"),
    ([], NO, "bf16", "MIXED_PRECISION) = no, but train.precision = auto settles on bf16"),
    (["train.precision=fp32"], AUTO, "fp32", None),  # a contradiction, refused before
    (["model.dtype=bf16"], NO, "bf16", None),
]


@pytest.mark.parametrize(("overrides", "environment", "settled", "said"), TOLD)
def test_where_auto_settles_on_another_type_than_accelerate_says_both_are_named(overrides, environment, settled, said):
    found = other_precision(planned(["strategy=ddp", *overrides])[0], settled, environment)
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


def test_what_a_deepspeed_file_says_of_bf16_is_named_beside_what_auto_settles_on(tmp_path):
    recipe, plan = planned(["strategy=zero2", "cluster.accelerator=cuda"])
    file = tmp_path / "deepspeed.json"
    file.write_text(job_spec(recipe, plan).files["deepspeed.json"])
    environment = {**ZERO, f"{PREFIX}CONFIG_FILE": str(file)}
    assert list(contradictions(recipe, plan, environment)) == []
    found = other_precision(recipe, "fp32", environment)
    here = "train.precision = auto settles on fp32 here, which decides"
    assert found == f"Accelerate's bf16.enabled ({file}) = bf16, but {here}"
    assert other_precision(recipe, "bf16", environment) is None


def planned(overrides: list[str]):
    recipe = load(RECIPE, overrides).recipe
    return recipe, make_plan(recipe)


@pytest.mark.parametrize(("overrides", "environment", "theirs", "ours"), CASES)
def test_a_contradiction_names_both_sides_and_agreement_says_nothing(overrides, environment, theirs, ours):
    found = [str(one) for one in contradictions(*planned(overrides), environment)]
    assert len(found) == (theirs is not None)
    for said in found:
        before, _, after = said.partition(", but ")
        assert theirs in before
        assert ours in after


FILE_CASES = [
    ({}, None, None),
    ({"train_batch_size": 16}, "train_batch_size", "train.global_batch_size = 8"),
    ({"gradient_clipping": 0.0}, "gradient_clipping", "train.max_grad_norm = 1.0"),
    ({"gradient_clipping": "auto"}, None, None),
    ({"zero_optimization.stage": 3}, "zero_optimization.stage", "stage of strategy.kind = 2"),
    ({"zero_optimization.offload_optimizer.device": "cpu"}, "offload_optimizer.device", "offload.optimizer = none"),
    ({"bf16.enabled": True}, "bf16.enabled", "train.precision = fp32, bf16 = false"),
    ({"optimizer.type": "Adam"}, "optimizer", "the section optimizer"),
]


@pytest.mark.parametrize(("changes", "theirs", "ours"), FILE_CASES)
def test_a_deepspeed_file_is_compared_key_by_key(changes, theirs, ours, tmp_path):
    recipe, plan = planned(["strategy=zero2", "train.precision=fp32"])
    values = json.loads(job_spec(recipe, plan).files["deepspeed.json"])
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(values))
    found = [str(one) for one in contradictions(recipe, plan, {**ZERO, f"{PREFIX}CONFIG_FILE": str(file)})]
    assert len(found) == (theirs is not None)
    for said in found:
        assert theirs in said.partition(", but ")[0]
        assert str(file) in said
        assert ours in said.partition(", but ")[2]


@pytest.mark.parametrize("damage", [None, "{not json"])
def test_a_deepspeed_file_that_is_not_there_says_nothing_and_a_damaged_one_is_named(damage, tmp_path):
    file = tmp_path / "deepspeed.json"
    if damage:
        file.write_text(damage)
    found = list(contradictions(*planned(["strategy=zero2"]), {**ZERO, f"{PREFIX}CONFIG_FILE": str(file)}))
    assert len(found) == (damage is not None)
    assert all("is not JSON" in str(one) for one in found)


@pytest.mark.parametrize("preset", ["ddp", "fsdp2", "fsdp2-offload", "zero1", "zero2", "zero3", "zero3-offload"])
@pytest.mark.parametrize("change", ["model.compile=false", "train.precision=bf16", "model.gradient_checkpointing=full"])
def test_the_rendered_file_agrees_with_its_own_run(preset, change, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    from tests.strategy.launched import launched

    recipe, plan = planned([f"strategy={preset}", change])
    for name, text in render(job_spec(recipe, plan), target="accelerate").files.items():
        (tmp_path / name).write_text(text)
    environment = {**launched(tmp_path / "accelerate.yaml")["environment"], "WORLD_SIZE": "2"}
    if name := environment.get(f"{PREFIX}CONFIG_FILE"):
        environment[f"{PREFIX}CONFIG_FILE"] = str(tmp_path / name)
    assert list(contradictions(recipe, plan, environment)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_everything_and_all_end_with_code_2(rank, tmp_path):
    recipe, plan = planned(["strategy=fsdp2", "train.precision=fp32"])
    run = RunDirectory(tmp_path / "run")
    run.create(to_dict(recipe), plan.to_dict(), {})
    run.data_file.write_text("{}")
    wrong = {"ACCELERATE_MIXED_PRECISION": "bf16", "RANK": str(rank), "WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}
    done = _trainer(run.path, wrong)
    assert done.returncode == 2
    if rank:
        assert done.stderr == ""
    else:
        assert done.stderr.count("\n  ") == 3
        assert "ACCELERATE_USE_FSDP = (not set), but strategy.kind = fsdp2" in done.stderr
        assert f"launcher render {run.recipe_file} --target accelerate" in done.stderr
        assert "Traceback" not in done.stderr


def _trainer(run: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.trainer", str(run)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
