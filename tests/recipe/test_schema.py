"""A recipe goes to plain values and back unchanged, through dicts, JSON and YAML, whatever it holds."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.recipe.compose import EXCLUSIVE, compose
from launcher.recipe.read import dump
from launcher.recipe.schema import MISSING, Recipe, from_dict, to_dict
from launcher.recipe.schema._docs import describe

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="$\x85\u2028\u2029\ufeff"),
    max_size=8,
)
TEXT = (TEXT | st.sampled_from(["no", "1e-5", "007", "12:00", "~", "null", "0x1F", ".5", "a: b", "- x"])).filter(
    lambda t: t != MISSING
)
KEY = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=5,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return st.one_of(st.none() if kind is type(None) else values_of(kind) for kind in arguments)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{f.name: values_of(hints[f.name]) for f in fields(hint)})
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(KEY, values_of(arguments[1]), max_size=3)
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 10**9),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: TEXT,
        bool: st.booleans(),
        Any: ANYTHING,
    }
    return scalars[hint]


@given(values_of(Recipe))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_recipe_survives_plain_values_and_json(recipe: Recipe):
    assert from_dict(to_dict(recipe)) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_a_recipe_stored_as_json_is_read_back_whatever_its_letters(here: Path):
    path = here / "stored.yaml"
    recipe = Recipe()
    recipe.run.tags = ["\U0001f916\xe9", "a\u2028b\x85", "\ufeff", "\\ud83e\\udd16", "\\", '"', "\t\n", "1e-5", "no"]
    recipe.model.name, recipe.data.seq_len, recipe.train.global_batch_size = "a/b", 8, 8
    path.write_text("# a comment\n" + json.dumps(to_dict(recipe), indent=2))
    assert compose(path).recipe == recipe


@given(values_of(Recipe))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_a_recipe_survives_being_shown_and_read_again(here: Path, recipe: Recipe):
    path = here / "again.yaml"
    path.write_text(dump(to_dict(recipe)), encoding="utf-8")
    assert compose(path).recipe == recipe


def test_a_recipe_of_another_version_is_refused_by_its_unknown_keys():
    with pytest.raises(TypeError, match=r"unknown keys \['new'\] in Train"):
        from_dict({"train": {"new": 1}})


def test_exclusive_keys_are_keys_of_the_schema_with_their_empty_values():
    plain = to_dict(Recipe())
    for group in EXCLUSIVE:
        for key, empty in group.items():
            section, name = key.split(".")
            assert plain[section][name] == empty


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number, or null"),
        (bool | int, "true or false or a whole number"),
        (typing.Literal["a"], "a"),
        (typing.Literal["auto", True, False], "auto, true or false"),
        (list[str], "a list of words"),
        (dict[str, Any], "a mapping"),
    ],
)
def test_a_type_is_described_in_words(hint: Any, words: str):
    assert describe(hint) == words
