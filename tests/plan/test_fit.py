"""What does not fit a GPU is refused with the cheapest change that does, and the change holds what is said of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launcher.errors import RecipeError, show_value
from launcher.plan import architecture, make_plan, memory_problems
from launcher.plan.fit import Change, applied, cheapest, combinations, gib
from launcher.plan.memory import GIB, estimate
from launcher.plan.mesh import make_mesh
from launcher.recipe.check import load
from launcher.recipe.schema import Recipe
from tests.plan.test_memory import LLAMA3_8B, memory_of, recipe
from tests.recipe.make import write

YAML = f"""
model: {{config: {LLAMA3_8B}, tokenizer: tokenizer.json}}
data: {{train: [{{path: data.jsonl}}], seq_len: 8192}}
train: {{global_batch_size: 64, micro_batch_size: 2, max_steps: 10}}
cluster: {{nproc_per_node: 8}}
"""


def problem(made: Recipe, limit: float) -> Any:
    made.cluster.gpu_memory_gib = limit
    found = list(memory_problems(made, make_plan(made)))
    assert len(found) <= 1
    return found[0] if found else None


def test_a_plan_that_fits_or_has_no_limit_is_not_complained_about():
    assert problem(recipe(kind="fsdp2"), 80) is None
    assert list(memory_problems(recipe(kind="ddp"), make_plan(recipe(kind="ddp")))) == []


def test_the_complaint_names_the_need_its_parts_and_one_change_with_its_cost():
    found = problem(recipe(kind="ddp"), 80)
    assert found.key == "cluster.gpu_memory_gib"
    assert found.expected.startswith("at least 145.8 GiB on each rank: moments 59.83, ")
    assert found.fix.startswith("Cheapest change that fits, ")
    assert "strategy.kind=fsdp2 (weights travel too" in found.fix


def test_an_architecture_without_a_formula_is_not_checked():
    made = recipe(kind="ddp")
    made.model.config = {"model_type": "mamba"}
    assert problem(made, 1) is None


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("data.jsonl", "tokenizer.json"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, YAML)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("limit", [24, 40, 80])
@pytest.mark.parametrize("start", ["kind=ddp", "kind=fsdp2", "kind=zero1", "kind=zero3"])
def test_the_change_that_is_named_makes_check_pass_and_no_cheaper_one_does(place, start, limit):
    from launcher.errors import RecipeError

    overrides = [f"strategy.{start}"]
    made = load(place, overrides).recipe
    known = architecture(made)
    assert known is not None
    change, memory, fits = cheapest(made, *known, limit=limit)
    told = [*overrides, f"cluster.gpu_memory_gib={limit}"]
    if not change.keys:
        assert load(place, told)
        return
    with pytest.raises(RecipeError, match=r"cluster\.gpu_memory_gib") as refused:
        load(place, told)
    if not fits:
        assert "the least is" in str(refused.value)
        return
    assert f"{change} ({change.cost})" in str(refused.value)
    assert load(place, [*told, *arguments(change)])
    assert memory.total <= limit * GIB
    for other in combinations(made):
        if other.price >= change.price:
            break
        changed = applied(made, other)
        if _passes_all_rules(place, [*overrides, *arguments(other)]):
            assert estimate(changed, *known, make_mesh(changed)).total > limit * GIB


def arguments(change: Change) -> list[str]:
    return [f"{key}={show_value(value)}" for key, value in change.keys]


def _passes_all_rules(place: Any, overrides: list[str]) -> bool:
    try:
        return bool(load(place, overrides))
    except RecipeError:
        return False


def test_changes_are_tried_in_the_order_of_their_price():
    made = recipe(kind="ddp", micro=4)
    found = list(combinations(made))
    assert [change.price for change in found] == sorted(change.price for change in found)
    assert found[0].keys == ()
    assert str(found[1]) == "train.micro_batch_size=2"
    assert all(dict(change.keys).get("cluster.nodes", 1) >= 1 for change in found)


def test_copies_give_way_to_shards_and_weights_that_stay_to_those_that_go():
    made = recipe(nodes=2, kind="fsdp2", shard=8, reshard_after_forward=False)
    texts = [str(change) for change in combinations(made)]
    assert "strategy.reshard_after_forward=true" in texts
    assert "strategy.shard=null" in texts
    assert "strategy.reshard_after_forward=true strategy.shard=null" in texts


def test_one_gpu_is_offered_host_memory_which_ddp_cannot_use():
    made = recipe(kind="ddp", replicate=1)
    made.cluster.nproc_per_node = 1
    found = problem(made, 40)
    assert "strategy.kind=fsdp2 strategy.replicate=null strategy.offload.optimizer=cpu" in found.fix


def test_nothing_that_fits_says_the_least_that_was_found():
    found = problem(recipe(kind="fsdp2"), 2)
    assert found.fix.startswith("No change of batch, recomputation, sharding, offload or nodes fits: the least is ")
    assert " GiB, with " in found.fix


def test_the_search_takes_a_fraction_of_a_check():
    made = recipe(kind="ddp", micro=8, nodes=2)
    known = architecture(made)
    assert known is not None
    began = time.process_time()
    cheapest(made, *known, limit=1)
    assert time.process_time() - began < 1.0  # 0.1 s on a quiet machine


def test_smaller_micro_batches_cost_nothing_but_speed():
    made = recipe(kind="fsdp2", micro=8)
    found = problem(made, memory_of(made).total / GIB - 0.5)
    assert "train.micro_batch_size=4 (more and smaller forward passes, the same result)" in found.fix


def test_figures_close_to_the_limit_have_the_digits_that_tell_them_from_it():
    assert gib(int(1.5712 * GIB)) == "1.6 GiB", "rounded up: what is named suffices"
    assert gib(int(1.5512 * GIB), within=1.56) == "1.56 GiB"
    assert gib(int(1.5551 * GIB), within=1.5558) == "1.5551 GiB"
    assert gib(int(1.5551 * GIB), within=80) == "1.6 GiB"
