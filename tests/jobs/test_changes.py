"""Which changes of a recipe are listed, and which make it another run."""

from __future__ import annotations

import pytest

from launcher.jobs.changes import Change, changes, identity
from launcher.recipe.schema import Data, Model, Recipe, Source, Train, to_dict


def recipe() -> dict:
    made = Recipe(
        model=Model(config={"model_type": "llama", "hidden_size": 8}, tokenizer="t"),
        data=Data(train=[Source(path="a.jsonl")], seq_len=32),
        train=Train(global_batch_size=4, max_steps=2),
    )
    return to_dict(made)


@pytest.mark.parametrize(
    ("section", "key", "value", "breaks"),
    [
        ("model", "tokenizer", "u", True),
        ("model", "config", {"model_type": "llama", "hidden_size": 16}, True),
        ("model", "dtype", "bf16", True),
        ("model", "attention", "eager", False),
        ("data", "train", [{"path": "b.jsonl"}], True),
        ("data", "seq_len", 64, True),
        ("data", "cache_dir", "/elsewhere", False),
        ("data", "num_workers", 3, False),
        ("train", "seed", 1, True),
        ("train", "global_batch_size", 8, True),
        ("train", "micro_batch_size", 2, False),
        ("train", "max_steps", 9, False),
        ("adapter", "kind", "lora", True),
        ("objective", "kind", "pretrain", True),
        ("optimizer", "lr", 0.5, False),
        ("strategy", "kind", "ddp", False),
        ("cluster", "nproc_per_node", 4, False),
    ],
)
def test_a_change_is_listed_and_known_to_break_the_identity_or_not(section, key, value, breaks):
    old, new = recipe(), recipe()
    new[section][key] = value
    found = changes(old, new)
    assert {change.key.split(".")[0] for change in found} == {section}
    assert {change.breaks_identity for change in found} == {breaks}


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("kind", "full", False),
        ("rank", 4, False),
        ("targets", ["q_proj"], False),
        ("alpha", 1.0, True),
        ("dropout", 0.5, True),
    ],
)
def test_another_adapter_is_another_run_and_only_its_alpha_and_dropout_fit_its_checkpoints(key, value, fits):
    old, new = recipe(), recipe()
    old["adapter"]["kind"] = new["adapter"]["kind"] = "lora"
    new["adapter"][key] = value
    (found,) = changes(old, new)
    assert found.breaks_identity
    assert found.breaks_checkpoints is not fits


def test_the_rank_of_an_adapter_that_is_not_there_is_no_change():
    new = recipe()
    new["adapter"].update(rank=4, targets=["q_proj"], alpha=3.0, dropout=0.1)
    assert changes(recipe(), new) == []


def test_equal_recipes_have_no_changes_and_a_moved_run_is_none():
    new = recipe()
    new["run"]["dir"], new["run"]["name"] = "/moved", "other"
    assert changes(recipe(), new) == []


def test_a_change_shows_key_old_and_new_as_yaml_would():
    assert str(Change("train.max_steps", None, 5)) == "train.max_steps: null -> 5"


def test_identity_holds_exactly_the_keys_whose_change_would_break_it():
    values = identity(recipe())
    assert values["train.seed"] == 0
    assert values["model.config.hidden_size"] == 8
    assert not {"data.cache_dir", "data.num_workers", "optimizer.lr", "run.name"} & set(values)
