"""Whatever is written, a recipe is composed or refused with a RecipeError; never another exception."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import RecipeError
from launcher.recipe.check import load
from launcher.recipe.names import known_keys
from launcher.recipe.read import dump

SETTINGS = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = st.sampled_from(
    ["auto", "ddp", "a/b", "./x", "${train.seed}", "${a", "???", "chat.jsonl", "*", "[", "", "llama"]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | WORDS | st.text(max_size=5)
PARTS = {part for key in known_keys() for part in key.split(".")}
KEYS = st.sampled_from(sorted(PARTS | {"preset", "extends", "0", "x"}))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
RECIPES = st.dictionaries(KEYS, VALUES, max_size=6)
PIECES = st.sampled_from(
    [
        "=",
        "train",
        ".",
        "model",
        "0",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "~",
        "'",
        " ",
        "path",
        "data",
        "null",
        "-",
        "${",
        "}",
    ]
)
ARGUMENTS = st.lists(PIECES, max_size=8).map("".join) | st.tuples(st.sampled_from(known_keys()), SCALARS).map(
    lambda pair: f"{pair[0]}={pair[1]}"
)


def read(values: dict[str, Any], arguments: list[str], folder: Path) -> None:
    path = folder / "fuzz.yaml"
    path.write_text(dump(values), encoding="utf-8")
    with contextlib.suppress(RecipeError):
        load(path, arguments)


@given(RECIPES)
@SETTINGS
def test_any_values_are_composed_or_refused(here: Path, values: dict[str, Any]):
    read(values, [], here)


@given(st.lists(ARGUMENTS, max_size=4))
@SETTINGS
def test_any_arguments_are_composed_or_refused(here: Path, arguments: list[str]):
    (here / "chat.jsonl").write_text("{}\n")
    good = {"model": {"name": "a/b"}, "data": {"train": [{"path": "chat.jsonl"}], "seq_len": 8}}
    read({**good, "train": {"global_batch_size": 8, "max_steps": 1}}, arguments, here)


@given(st.text(alphabet=st.sampled_from(list("[]{}:,-#&*!|>'\"%@` \n\tab01.~?$"))))
@SETTINGS
def test_any_text_is_composed_or_refused(here: Path, text: str):
    path = here / "fuzz.yaml"
    path.write_text(text, encoding="utf-8")
    with contextlib.suppress(RecipeError):
        load(path)
