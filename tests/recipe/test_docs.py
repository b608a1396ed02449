"""The page of recipe keys is the schema's, and no key is without a meaning."""

from __future__ import annotations

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from launcher.recipe.schema import Recipe, Source
from launcher.recipe.schema._docs import field_docs, page

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def classes(cls: type) -> list[type]:
    found = [cls]
    for hint in typing.get_type_hints(cls).values():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if is_dataclass(inner):
            found += classes(typing.cast(type, inner))
    return found


@pytest.mark.parametrize(
    "cls", sorted(set(classes(Recipe)), key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__
)
def test_every_key_of_a_section_has_a_meaning_in_its_docstring(cls: type):
    docs = field_docs(cls)
    assert set(docs) == {f.name for f in fields(cls)}
    assert all(len(meaning) > 5 for meaning in docs.values())


def test_every_section_is_visited():
    assert {Recipe, Source} <= set(classes(Recipe))
    assert len(set(classes(Recipe))) == 21


def test_the_committed_page_is_what_the_schema_says():
    assert PAGE.read_text() == page(), "run: python -m launcher.recipe.schema._docs > docs/recipe.md"


def test_every_dotted_key_is_in_the_page():
    from launcher.recipe.names import known_keys

    text = PAGE.read_text()
    for key in known_keys():
        documented = f"`{key.replace('.0.', '.N.')}`"
        assert documented in text or f"## {key}\n" in text or key.startswith("data.eval.0."), key


def test_names_of_other_trainers_lead_to_keys_that_exist():
    from launcher.recipe.names import _ELSEWHERE, known_keys

    assert {target.split(" ")[0] for target in _ELSEWHERE.values()} <= set(known_keys())


def test_a_meaning_may_go_on_over_lines():
    from dataclasses import dataclass

    @dataclass
    class Section:
        """A section.

        key: one thing
            and another
        other: last
        """

        key: int = 0
        other: int = 0

    assert field_docs(Section) == {"key": "one thing and another", "other": "last"}
