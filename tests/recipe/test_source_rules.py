"""What `check` refuses of a source before any record is read: what stands behind `#`, and names in columns and tags."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.data.sources import find
from launcher.errors import UserError
from launcher.recipe.paths import check_data_paths
from launcher.recipe.rules.sources import data_sources
from launcher.recipe.schema import Source, from_dict
from launcher.recipe.schema.columns import COLUMNS, columns_of


def problems(**source: Any) -> list[str]:
    recipe = from_dict({"model": {"name": "x"}, "data": {"train": [source]}, "train": {"max_steps": 1}})
    return [str(problem) for problem in [*data_sources(recipe), *check_data_paths(recipe)]]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "c.jsonl#old.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.jsonl"}}))


@pytest.mark.parametrize(
    "source",
    [
        {"path": "a.jsonl"}, {"path": "a.jsonl#5"}, {"path": "b.json#5"}, {"path": "org/data#5"},
        {"path": "c.jsonl#old.jsonl"}, {"path": "dataset_info.json#mine"}, {"path": "dataset_info.json#mine#5"},
        {"path": "s3://bucket/a.jsonl#5"}, {"path": "a.jsonl", "columns": {"conversations": "turns"}},
        {"path": "a.jsonl", "format": "sharegpt", "tags": {"role_tag": "who"}, "columns": {"messages": "turns"}},
    ],
)  # fmt: skip
def test_what_means_something_is_allowed(source):
    assert problems(**source) == []


REGISTRY = "data.train.0.path = dataset_info.json{}: expected the name of an entry behind it"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"path": "a.jsonl#0"},
            "data.train.0.path = a.jsonl#0: expected a number of records behind the #, 1 or more, as",
        ),
        ({"path": "a.jsonl#-3"}, "data.train.0.path = a.jsonl#-3: expected a number of records behind the #"),
        ({"path": "a.jsonl#abc"}, "data.train.0.path = a.jsonl#abc: expected a number of records behind the #"),
        ({"path": "a.jsonl#"}, "data.train.0.path = a.jsonl#: expected a number of records behind the #"),
        ({"path": "org/data#1#2"}, "data.train.0.path = org/data#1#2: expected a number of records behind the #"),
        ({"path": "b.json#abc"}, "data.train.0.path = b.json#abc: expected a number of records behind the #, or a reg"),
        (
            {"path": "a.jsonl#1", "max_samples": 2},
            "data.train.0.max_samples = 2: expected null, because the path says #1",
        ),
        ({"path": "dataset_info.json"}, REGISTRY.format("")),
        ({"path": "dataset_info.json#5"}, REGISTRY.format("#5")),
        (
            {"path": "dataset_info.json#mine#0"},
            "data.train.0.path = dataset_info.json#mine#0: expected a number of rec",
        ),
        (
            {"path": "dataset_info.json#mine", "format": "alpaca"},
            "data.train.0.format = alpaca: expected auto: the regi",
        ),
        (
            {"path": "dataset_info.json#mine", "split": "train"},
            "data.train.0.split = train: expected null: the registry",
        ),
        (
            {"path": "a.jsonl", "format": "messages", "columns": {"mesages": "x"}},
            "data.train.0.columns.mesages = x: expected a name that format messages has: messages, system, tools.",
        ),
        ({"path": "a.jsonl", "columns": {"promt": "x"}}, "data.train.0.columns.promt = x: expected a name that any fo"),
        (
            {"path": "a.jsonl", "tags": {"rol_tag": "x"}},
            "data.train.0.tags.rol_tag = x: expected one of role_tag, conte",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_the_key(source, message):
    found = problems(**source)
    assert found
    assert found[0].startswith(message)


def test_what_is_no_number_of_records_is_refused_without_check_too():
    with pytest.raises(UserError, match=r"a.jsonl#-3: #-3: expected a number of records, 1 or more, as a.jsonl#500\."):
        find(Source(path="a.jsonl#-3"))


def test_auto_takes_the_columns_of_every_format():
    assert set(columns_of("auto")) == {name for names in COLUMNS.values() for kind in names for name in kind}
