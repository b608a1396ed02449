"""Settings of DDP and FSDP2, each with a reason, and the file that holds them."""

from __future__ import annotations

import json

import pytest

from launcher.jobs.spec import job_spec
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.shipped import folder
from launcher.strategy import engine_settings, explain, settings_file

TINY = folder("recipes") / "tiny-cpu.yaml"


def made(*overrides: str):
    recipe = load(TINY, overrides).recipe
    return recipe, make_plan(recipe)


@pytest.mark.parametrize(
    ("preset", "file"),
    [("ddp", "ddp.json"), ("fsdp2", "fsdp2.json"), ("zero1", "deepspeed.json"), ("zero3", "deepspeed.json")],
)
def test_a_job_carries_the_settings_of_its_engine(preset, file):
    recipe, plan = made(f"strategy={preset}")
    assert settings_file(recipe) == file
    assert json.loads(job_spec(recipe, plan).files[file]) == engine_settings(recipe, plan)
    assert all(reason for _, reason in explain(recipe, plan).values())


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["strategy=fsdp2"], "mesh.shard", 2),
        (["strategy=hsdp", "cluster.nodes=2"], "mesh.replicate", 2),
        (["strategy=fsdp2", "strategy.reshard_after_forward=false"], "reshard_after_forward", False),
        (["strategy=fsdp2", "strategy.reshard_after_forward=2"], "reshard_after_forward", 2),
        (["strategy=fsdp2", "strategy.prefetch=3"], "prefetch", 3),
        (["strategy=fsdp2", "train.precision=bf16"], "mixed_precision.param_dtype", "bf16"),
        (["strategy=fsdp2", "train.precision=bf16"], "mixed_precision.reduce_dtype", "fp32"),
        (["strategy=fsdp2", "model.dtype=bf16"], "mixed_precision.weights", "bf16"),
        (["strategy=fsdp2-offload"], "offload", "cpu"),
        (["strategy=fsdp2-offload"], "pin_memory", False),
        (["strategy=fsdp2", "model.gradient_checkpointing=selective"], "recompute", "selective"),
        (["strategy=ddp"], "mesh.replicate", 2),
        (["strategy=ddp", "train.precision=bf16"], "compute", "bf16"),
        (["strategy=ddp", "model.compile=true"], "compile", True),
    ],
)
def test_a_key_of_the_recipe_shows_in_the_settings(overrides, key, value):
    assert explain(*made(*overrides))[key][0] == value


def test_each_way_of_resharding_says_another_reason():
    kinds = ("true", "false", "2")
    reasons = {
        explain(*made("strategy=fsdp2", f"strategy.reshard_after_forward={k}"))["reshard_after_forward"][1]
        for k in kinds
    }
    assert len(reasons) == 3
