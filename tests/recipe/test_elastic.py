"""Elastic recipes: each number of nodes an attempt may have is planned, and refused in words where it cannot be."""

from __future__ import annotations

import json

import pytest

from launcher.cli import main
from launcher.errors import RecipeError
from launcher.plan import make_plan
from launcher.plan.elastic import empty, plans
from launcher.recipe.elastic import on_nodes
from tests.recipe.make import GOOD, loaded, write

FOUR = ["cluster.nodes=4", "cluster.nproc_per_node=2", "cluster.min_nodes=2"]
TINY = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
MODEL = f"model={{config: {json.dumps(TINY)}, tokenizer: a/b}}"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_global_batch_stays_and_slots_that_it_does_not_fill_have_weight_0(folder):
    recipe = loaded(folder, *FOUR).recipe
    found = plans(recipe)
    assert [plan.nodes for plan in found] == [2, 3, 4]
    assert [plan.global_batch_size for plan in found] == [8, 8, 8]
    assert [(plan.accumulation_steps, empty(plan)) for plan in found] == [(2, 0), (2, 4), (1, 0)]
    assert recipe.cluster.nodes == 4  # the recipe itself stays as it is


def test_a_recipe_that_is_not_elastic_has_one_plan(folder):
    recipe = loaded(folder, *FOUR[:2]).recipe
    assert plans(recipe) == [make_plan(recipe)]
    assert on_nodes(recipe, 4) is recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["cluster.min_nodes=5"], "cluster.min_nodes = 5: expected 1 to the 4 of cluster.nodes"),
        (["cluster.min_nodes=0"], "cluster.min_nodes = 0: expected 1 to the 4"),
        (["strategy={kind: fsdp2, shard: 4}"], "with 3 nodes strategy.shard = 4 is refused"),
        (["strategy={kind: fsdp2, replicate: 4}"], "which has to be a divisor of the world size 6 (3 nodes x 2)"),
        (["strategy={kind: ddp, replicate: 8}"], "with 3 nodes strategy.replicate = 8 is refused"),
        (
            ["strategy={kind: zero3, zero: {hpz_partition_size: 4}}"],
            "with 3 nodes strategy.zero.hpz_partition_size = 4 is refused",
        ),
        (["strategy={kind: fsdp2, reshard_after_forward: 4}"], "with 3 nodes strategy.reshard_after_forward = 4"),
        (["cluster.target=accelerate"], "accelerate launch starts a fixed number of machines"),
        (["cluster.target=kubernetes", "cluster.kubernetes={image: a/b:1, claim: c}"], "a JobSet makes all its pods"),
        (
            ["cluster.target=kubernetes", "cluster.kubernetes={image: a/b:1, claim: c, kind: trainjob}"],
            "Trainer makes exactly numNodes pods",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_fewer_nodes_is_refused_in_words(folder, capsys, changes, words):
    assert call("check", write(folder), *FOUR, *changes) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "cluster.min_nodes" in said


@pytest.mark.parametrize("changes", [["strategy={kind: fsdp2, shard: 2}"], ["strategy.kind=zero3"], []])
def test_what_fits_every_number_of_nodes_is_accepted(folder, changes):
    assert loaded(folder, *FOUR, *changes).recipe.cluster.min_nodes == 2


def test_the_memory_of_the_fewest_nodes_is_checked_and_the_number_that_fits_is_named(folder):
    sharded = [MODEL, *FOUR, "strategy.kind=fsdp2", "data.seq_len=128", "train.micro_batch_size=1"]
    found = plans(loaded(folder, *sharded, text=GOOD.replace("model: {name: org/model}", "")).recipe)
    need = [plan.memory.total / 2**30 for plan in found]
    assert need[0] > need[1] > need[2]
    between = f"cluster.gpu_memory_gib={(need[0] + need[1]) / 2}"
    with pytest.raises(RecipeError, match=r"cluster.min_nodes = 2: expected 3 or more: on 2 a rank needs .* Use 3\."):
        loaded(folder, *sharded, between, text=GOOD.replace("model: {name: org/model}", ""))
    loaded(folder, *sharded, f"cluster.gpu_memory_gib={need[0] + 1}", text=GOOD.replace("model: {name: org/model}", ""))


def test_plan_shows_the_split_of_each_number_of_nodes(folder, capsys):
    assert call("plan", write(folder), *FOUR) == 0
    said = capsys.readouterr().out
    assert "2 nodes: 2 forwards a rank; 3 nodes: 2 forwards a rank, 4 slots of weight 0; 4 nodes: 1 forward" in said


def test_the_scripts_of_an_elastic_torchrun_job_start_workers_that_may_come_again(folder, capsys):
    assert call("render", write(folder), *FOUR, "run.name=big", "-o", "job") == 0
    script = (folder / "job" / "node-3.sh").read_text()
    assert '--nodes 4 \\\n  --node-rank 3 \\\n  --rendezvous "$LAUNCHER_RENDEZVOUS"' in script
    assert "exec launcher worker " in script
    assert "torchrun --" not in script
