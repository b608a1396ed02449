"""The plan: mesh, batch and memory arithmetic, and that it needs nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launcher.plan import Mesh, Plan, make_plan
from launcher.plan.batch import accumulation_steps
from launcher.plan.mesh import make_mesh
from launcher.recipe.schema import Cluster, Data, Model, Recipe, Source, Strategy, Train

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 301,
}  # fmt: skip


def recipe(nodes: int = 1, nproc: int = 2, batch: int = 8, **strategy) -> Recipe:
    return Recipe(
        model=Model(config=LLAMA, tokenizer="somewhere"),
        data=Data(train=[Source(path="data.jsonl")], seq_len=128),
        train=Train(global_batch_size=batch, max_steps=10),
        strategy=Strategy(**strategy),
        cluster=Cluster(nodes=nodes, nproc_per_node=nproc),
    )


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ({"kind": "ddp"}, Mesh(8, 1)),
        ({"kind": "fsdp2"}, Mesh(1, 8)),
        ({"kind": "fsdp2", "shard": 4}, Mesh(2, 4)),
        ({"kind": "fsdp2", "replicate": 4}, Mesh(4, 2)),
        ({"kind": "fsdp2", "replicate": 2, "shard": 4}, Mesh(2, 4)),
    ],
)
def test_open_mesh_axes_are_filled_from_the_world_size(strategy, mesh):
    assert make_mesh(recipe(2, 4, **strategy)) == mesh


@pytest.mark.parametrize(
    ("batch", "micro", "world", "steps"), [(8, 1, 2, 4), (8, 4, 2, 1), (7, 1, 2, 4), (1, 1, 8, 1), (9, 2, 2, 3)]
)
def test_accumulation_covers_the_global_batch_and_not_a_slot_more_than_needed(batch, micro, world, steps):
    assert accumulation_steps(global_batch_size=batch, micro_batch_size=micro, world_size=world) == steps


def test_plan_of_a_small_recipe():
    plan = make_plan(recipe(kind="fsdp2"))
    assert (plan.world_size, plan.accumulation_steps, plan.tokens_per_step) == (2, 4, 1024)
    assert plan.parameters is not None
    assert plan.parameters.total == 2 * 301 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64
    assert (plan.rows, plan.steps_per_epoch, plan.total_steps) == (None, None, None)


def test_plan_survives_json_unchanged():
    for made in (
        make_plan(recipe()),
        make_plan(Recipe(**{**_fields(recipe()), "model": Model(config={"model_type": "mamba"})})),
    ):
        assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def _fields(made: Recipe) -> dict:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def test_unknown_architecture_leaves_parameters_memory_and_traffic_null_and_says_why():
    plan = make_plan(Recipe(**{**_fields(recipe()), "model": Model(config={"model_type": "mamba"})}))
    assert (plan.parameters, plan.memory, plan.traffic) == (None, None, None)
    assert "mamba" in plan.parameters_note


def test_plan_imports_nothing_heavy():
    code = "import launcher.plan, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "numpy", "omegaconf", "yaml", "rich"}
