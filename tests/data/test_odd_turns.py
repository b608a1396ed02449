"""What is odd in a conversation that is still read is counted: keys that nothing reads, turns in an odd order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.data.formats import choose
from launcher.data.prepare import prepare
from launcher.errors import UserError
from launcher.recipe.schema import Source, from_dict
from tests.data.make import tiny_tokenizer, write_jsonl

ASK, SAY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "3"}


def noted(record: dict[str, Any], **source: Any) -> list[str]:
    notes: list[str] = []
    choose(Source(path="a.jsonl", **source), list(record), record).read(record, notes.append)
    return notes


def of(folder: Path, name: str) -> Any:
    """A recipe of one file of the folder."""
    tokenizer = str(tiny_tokenizer(folder / "tokenizer"))
    data = {
        "train": [{"path": str(folder / name)}],
        "seq_len": 64,
        "num_workers": 1,
        "cache_dir": str(folder / "cache"),
    }
    return from_dict({
        "model": {"config": {"model_type": "llama", "vocab_size": 400}, "tokenizer": tokenizer},
        "data": data, "train": {"global_batch_size": 4, "epochs": 1},
    })  # fmt: skip


def test_a_key_of_a_message_that_nothing_reads_is_counted_once_a_record_with_the_nearest_one():
    said = "key 'wieght' of a message is not read. Did you mean 'weight'?"
    assert noted({"messages": [ASK, {**SAY, "wieght": 0.0}, ASK, {**SAY, "wieght": 1}]}) == [said]
    assert noted({"messages": [ASK, {**SAY, "zz": 1}]}) == ["key 'zz' of a message is not read"]
    pair = {
        "prompt": [{**ASK, "zz": 1}],
        "chosen": [{**SAY, "zz": 1}],
        "rejected": [{**SAY, "content": "You.", "zz": 1}],
    }
    assert noted(pair) == ["key 'zz' of a message is not read"]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "vaule": "c"}]
    assert noted({"conversations": turns}) == ["key 'vaule' of a message is not read. Did you mean 'value'?"]


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "annotations": [], "audio": None},
        {"weight": 1, "train": True},
        {"loss": 0.5},
        {"name": "a"},
    ],
)
def test_keys_that_are_read_or_empty_are_not_counted(more):
    assert noted({"messages": [ASK, {**SAY, **more}]}) == []


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([ASK, SAY, ASK], ["ends with a user turn, nobody answers it"]),
        ([ASK, CALL, RESULT], ["ends with a tool result, nobody answers it"]),
        ([ASK, ASK, SAY], ["two user turns in a row"]),
        ([ASK, ASK, ASK, SAY], ["two user turns in a row"]),
        ([ASK, SAY, SAY], ["two assistant turns in a row"]),
        ([{**ASK, "content": " "}, SAY], ["a user turn without words"]),
        ([{"role": "system", "content": "Be kind."}, ASK, CALL, RESULT, RESULT, SAY, ASK, SAY], []),
        ([ASK, {**SAY, "content": "I add."}, CALL, RESULT, CALL, RESULT, SAY], []),
        ([ASK, SAY, CALL, CALL, RESULT, SAY], []),
    ],
)
def test_an_odd_order_of_turns_is_counted_and_tools_are_not_odd(turns, said):
    assert noted({"messages": turns}) == said
    if turns[-1] == SAY:
        assert noted({"messages": turns, "label": True}) == said


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("asistant", "Did you mean 'assistant'? Or name it with tags, as tags: {assistant_tag: asistant}."),
        ("sistem", "Did you mean 'system'? Or name it with tags, as tags: {system_tag: sistem}."),
        ("xyzzy", "others. Name it with tags, as tags: {user_tag: xyzzy}."),
    ],
)
def test_an_unknown_role_is_told_the_tag_of_the_nearest_one(role, said):
    with pytest.raises(UserError) as error:
        noted({"messages": [ASK, {"role": role, "content": "b"}]})
    assert str(error.value).endswith(said)


def test_null_content_and_broken_arguments_say_what_to_do():
    with pytest.raises(
        UserError, match=r"turn 1: 'content' is null, expected text\. Fill it, or leave the record out\."
    ):
        noted({"messages": [{**ASK, "content": None}, SAY]})
    with pytest.raises(UserError, match=r"is not JSON: Expecting value at character 7: '.*'\. Write it as JSON\."):
        noted({"messages": [ASK, {**SAY, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": '}}]}]})


def test_what_is_odd_is_in_the_counts_of_prepare_and_refused_when_strict(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [ASK, {**SAY, "mask": 1}]}, {"messages": [ASK, SAY, ASK]}])
    recipe = of(tmp_path, "a.jsonl")
    made = prepare(recipe).train
    (end, key) = sorted(made["changed"])
    assert (made["documents"], made["changed"]) == (2, {key: 1, end: 1})
    assert end.startswith("ends with a user turn")
    assert key.startswith("key 'mask' of a message is not read")
    with pytest.raises(UserError, match=r"strict.*\n.*key 'mask' of a message is not read.*: 1, the first is "):
        prepare(recipe, strict=True)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            '{"text": "a"}\n{"text": }\n',
            "a.jsonl",
            r"line 2: not JSON: Expecting value at character 10\. Write the reco",
        ),
        (b"no", "a.jsonl.gz", r"cannot be uncompressed: .*\. Make the file again, or rename it to what it is\."),
        ("", "a.jsonl", r"a.jsonl: holds no records\. Fill it, or remove the source\."),
    ],
)
def test_a_broken_file_says_what_to_do(content, name, message, tmp_path):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    recipe = of(tmp_path, name)
    with pytest.raises(UserError, match=message):
        prepare(recipe)


def test_a_system_column_beside_a_system_turn_is_counted_as_not_read():
    lead = {"role": "system", "content": "Be short."}
    assert noted({"messages": [lead, ASK, SAY], "system": "Be short."}) == []
    (note,) = noted({"messages": [lead, ASK, SAY], "system": "Be long."})
    assert note.startswith("the system column is not read")
