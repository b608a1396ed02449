"""What the data section refuses, with the key, what is allowed and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.recipe.rules import sources as rules
from launcher.recipe.schema import from_dict
from launcher.recipe.schema.data import check


def recipe(*, objective: str = "sft", steps: dict[str, Any] | None = None, **data: Any):
    return from_dict({
        "model": {"name": "x"}, "objective": {"kind": objective},
        "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "seq_len": 64, **data},
        "train": {"global_batch_size": 4, **(steps or {"max_steps": 3})},
    })  # fmt: skip


def problems(made: Any) -> list[str]:
    own = [*check(made.data), *rules.documents(made), *rules.stream(made), *rules.evaluation(made)]
    return [str(problem) for problem in own]


def two(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"train": [{"path": "a.jsonl", **first}, {"path": "b.jsonl", **second}]}


STREAM = {"streaming": True, "train": [{"path": "a.jsonl"}]}


@pytest.mark.parametrize(
    "data",
    [
        {},
        two({"weight": 1}, {"weight": 0.5}),
        {"train_roles": ["assistant", "user", "system"], "train_end_of_turn": False},
        {"placeholders": {"name": "Ada", "author_2": "us"}},
        {"repack": 64},
        {"mix": {"by": "rows", "temperature": 3.0, "until": "last"}},
        {"eval": [{"path": "a.jsonl", "name": "same"}, {"path": "b.jsonl", "name": "same"}]},
        {**STREAM, "shuffle_buffer": 1, "packing": "concat", "overlong": "split"},
        {"eval_fraction": 0.1},
    ],
)
def test_what_makes_sense_is_allowed(data):
    assert problems(recipe(**data)) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (two({"weight": 2}, {}), "data.train.1.weight = null: expected a weight, because other sources have one."),
        (two({"weight": -1}, {"weight": 1}), "data.train.0.weight = -1: expected a number above 0."),
        ({"eval": [{"path": "e", "weight": 2}]}, "data.eval.0.weight = 2: expected null: every evaluation record"),
        ({"mix": {"temperature": 0.0}}, "data.mix.temperature = 0.0: expected a number above 0. 1 keeps the shares"),
        ({"mix": {"temperature": float("inf")}}, "data.mix.temperature = inf: expected a number above 0"),
        (two({"name": "x"}, {"name": "x"}), "data.train.1.name = x: expected a name that no other training source"),
        (two({"name": " "}, {}), "data.train.0.name =  : expected a word"),
        ({"train_roles": ["user", "tool"]}, "data.train_roles.1 = tool: expected system, developer, user, assistant."),
        ({"train_roles": ["asistant"]}, "data.train_roles.0 = asistant: expected system, developer, user, assistant."),
        ({"train_roles": ["user", "user"]}, "data.train_roles.1 = user: expected each role once."),
        ({"train_roles": []}, "data.train_roles = []: expected at least one role."),
        ({"train_roles": ["user"], "train_on": "last_assistant"}, "data.train_roles = [user]: expected [assistant]"),
        ({"train_roles": ["user"], "train_on": "all"}, "data.train_roles = [user]: expected the default with train_on"),
        ({"train_end_of_turn": False, "train_on": "all"}, "data.train_end_of_turn = false: expected the default with"),
        ({"placeholders": {"my name": "x"}}, "data.placeholders.my name = x: expected names as they stand between"),
        ({"objective": "pretrain", "isolate": False}, "data.isolate = false: expected true with packing = best_fit"),
        ({"isolate": False, "packing": "concat"}, "data.isolate = false: expected true with objective.kind = sft"),
        ({"repack": 0}, "data.repack = 0: expected 1 to 64 packings"),
        ({"repack": 65}, "data.repack = 65: expected 1 to 64 packings"),
        ({"repack": 2, "packing": "none"}, "data.repack = 2: expected 1 with packing = none"),
        ({"packing": "concat", "overlong": "drop"}, "data.overlong = drop: expected error or split with packing"),
        ({"shuffle_buffer": 50}, "data.shuffle_buffer = 50: expected 1000, the default, without data.streaming: prep"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer = 0: expected 1 document or more"),
        ({**STREAM, "eval_fraction": 0.1}, "data.eval_fraction = 0.1: expected 0 with data.streaming"),
        ({**STREAM, "repack": 2}, "data.repack = 2: expected 1 with data.streaming"),
        ({**STREAM, "mix": {"until": "first"}}, "data.mix.until = first: expected total with data.streaming"),
        (
            {"streaming": True, **two({}, {})},
            "data.train.0.weight = null: expected a weight on each source with data.streaming",
        ),
        ({"streaming": True, "train": [{"path": "a", "max_samples": 5}]}, "data.train.0.max_samples = 5: expected"),
        ({**STREAM, "mix": {"by": "rows"}}, "data.mix.by = rows: expected tokens or documents with data.s"),
        ({**STREAM, "steps": {"epochs": 1}}, "train.max_steps = null: expected a number of steps with data"),
    ],
)  # fmt: skip
def test_what_makes_none_is_refused_with_key_value_and_what_is_allowed(data, message):
    found = problems(recipe(**data))
    assert len(found) == 1, found
    assert message in found[0]


def test_documents_may_follow_one_another_where_every_token_is_learnt():
    assert problems(recipe(objective="pretrain", packing="concat", isolate=False)) == []
