"""A section given as a word, and whose folder the word is looked for in first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.compose import compose
from tests.recipe.make import GOOD, value, write


def test_a_preset_replaces_what_lower_levels_said_of_its_section(here: Path):
    write(here, GOOD + "strategy: {kind: fsdp2, shard: 4, reshard_after_forward: false}\n", name="base.yaml")
    composed = compose(write(here, "extends: base.yaml\nstrategy: ddp\n"))
    assert value(composed, "strategy.kind") == "ddp"
    assert value(composed, "strategy.shard") is None
    assert value(composed, "strategy.reshard_after_forward") is True


def test_a_preset_on_the_command_line_wins_over_keys_in_the_file(here: Path):
    composed = compose(write(here, GOOD + "strategy: {kind: fsdp2, shard: 4}\n"), ["strategy=ddp"])
    assert value(composed, "strategy.kind") == "ddp"
    assert value(composed, "strategy.shard") is None


@pytest.mark.parametrize("arguments", [["strategy=hsdp", "strategy.shard=4"], ["strategy.shard=4", "strategy=hsdp"]])
def test_within_a_level_the_preset_comes_first_whatever_the_order(here: Path, arguments: list[str]):
    composed = compose(write(here), arguments)
    assert value(composed, "strategy.kind") == "fsdp2"
    assert value(composed, "strategy.shard") == 4


def test_preset_plus_changes_in_a_file(here: Path):
    composed = compose(write(here, GOOD + "strategy: {preset: fsdp2-offload, offload: {optimizer: none}}\n"))
    assert value(composed, "strategy.offload.optimizer") == "none"
    assert value(composed, "strategy.offload.params") == "cpu"
    assert str(composed.origins["strategy.offload.optimizer"]) == "recipe.yaml:6"
    assert str(composed.origins["strategy.offload.params"]).endswith("recipes/strategy/fsdp2-offload.yaml:3")


def test_a_change_beside_a_preset_takes_away_the_rival_key_of_the_preset(here: Path):
    write(here, "global_batch_size: 8\nmax_steps: 3\n", name="train/short.yaml")
    composed = compose(write(here, GOOD.rpartition("train:")[0] + "train: {preset: short, epochs: 2}\n"))
    assert (value(composed, "train.max_steps"), value(composed, "train.epochs")) == (None, 2.0)


def test_the_users_folders_come_before_the_shipped_ones_in_order(here: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = write(here, GOOD + "strategy: ddp\n", name="mine/recipe.yaml")
    monkeypatch.setenv("LAUNCHER_PRESETS", os.pathsep.join([str(here / "first"), str(here / "second")]))

    def shard() -> int | None:
        return compose(recipe).recipe.strategy.shard

    assert shard() is None  # the shipped ddp
    for number, place in enumerate(["second", "first", "mine", "mine/presets"], start=2):
        write(here, f"kind: fsdp2\nshard: {number}\n", name=f"{place}/strategy/ddp.yaml")
        assert shard() == number


def test_a_base_recipes_presets_lie_beside_the_base(here: Path):
    write(here, "kind: fsdp2\nshard: 9\n", name="base/strategy/mine.yaml")
    write(here, GOOD + "strategy: mine\n", name="base/base.yaml")
    composed = compose(write(here, "extends: base/base.yaml\n"))
    assert value(composed, "strategy.shard") == 9


def test_the_cluster_of_the_environment_replaces_the_recipes_and_yields_to_arguments(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LAUNCHER_CLUSTER", "node8")
    recipe = write(here, GOOD + "cluster: {nodes: 4, time_limit_min: 60}\n")
    composed = compose(recipe)
    assert (composed.recipe.cluster.nodes, composed.recipe.cluster.nproc_per_node) == (1, 8)
    assert composed.recipe.cluster.time_limit_min is None
    assert compose(recipe, ["cluster=cpu2"]).recipe.cluster.nproc_per_node == 2


def test_an_unknown_cluster_of_the_environment_is_an_error_that_names_the_variable(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LAUNCHER_CLUSTER", "node9")
    with pytest.raises(RecipeError, match=r"LAUNCHER_CLUSTER=node9: cluster = node9: .*Did you mean 'node8'\?"):
        compose(write(here))


def test_a_mistake_in_a_preset_points_into_the_preset(here: Path):
    write(here, "kind: fsdp2\nshards: 9\n", name="strategy/mine.yaml")
    with pytest.raises(RecipeError) as error:
        compose(write(here, GOOD + "strategy: mine\n"))
    (problem,) = error.value.problems
    assert problem.key == "strategy.shards"
    assert problem.where == "strategy/mine.yaml:2"
    assert problem.fix == "Did you mean strategy.shard?"


def test_a_preset_cannot_reach_outside_its_folder(here: Path):
    write(here, "kind: ddp\n", name="secret.yaml")
    with pytest.raises(RecipeError, match="a preset of strategy"):
        compose(write(here, GOOD + "strategy: ../secret\n", name="mine/recipe.yaml"))


def test_a_bare_name_is_a_shipped_recipe_and_can_be_extended(here: Path):
    assert compose("tiny-cpu").recipe.cluster.nproc_per_node == 2
    composed = compose(write(here, "extends: tiny-cpu\ntrain: {seed: 5}\n"))
    assert composed.recipe.train.seed == 5
    assert composed.recipe.train.max_steps == 50
