"""Whatever a record holds, reading it gives an example, or says in words why not."""

from __future__ import annotations

import json
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.formats import Example, Skip, choose
from launcher.data.formats.recognise import ALIASES, COLUMNS
from launcher.errors import UserError
from launcher.recipe.schema import Source

WORDS = st.sampled_from(
    ["", "a", "user", "assistant", "tool", "system", "[{", '{"name": "f"}', "\n\nHuman: a\n\nAssistant: b"]
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), WORDS)
KEYS = st.sampled_from(
    [
        "role", "content", "from", "value", "human", "assistant", "tool_calls", "function", "name", "arguments", "type",
        "text", "train", "weight", "loss", "reasoning", "images",
    ]
)  # fmt: skip
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "tool_call"]), "content": WORDS},
    optional={"tool_calls": VALUES, "train": VALUES, "weight": VALUES, "reasoning": VALUES},
)
NESTED = st.recursive(
    VALUES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=6
)
NAMES = sorted({name for names in ALIASES.values() for name in names} | {"images", "functions", "context"})
RECORDS = st.dictionaries(
    st.sampled_from(NAMES), st.one_of(NESTED, st.lists(TURNS, max_size=4), TURNS, WORDS), max_size=5
)


@settings(max_examples=200, deadline=None)
@given(first=RECORDS, later=RECORDS, name=st.sampled_from(["auto", *COLUMNS]), as_text=st.booleans())
def test_a_record_is_read_or_refused_in_words(first: Any, later: Any, name: Any, as_text: bool):
    if as_text:  # as csv gives them
        first, later = ({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in (first, later))
    try:
        form = choose(Source(path="f.jsonl", format=name), list(first), first, {"name": "Ada"})
    except UserError as error:
        told = str(error)
    else:
        told = read_all(form, (first, later))
    assert told


def read_all(form: Any, records: Any) -> str:
    """What is said of the format and of the records that it refuses."""
    told = form.said
    for record in records:
        try:
            assert isinstance(form.read(record), get_args(Example))
        except (UserError, Skip) as error:
            told += str(error)
    return told
