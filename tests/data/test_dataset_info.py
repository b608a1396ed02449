"""A registry of LLaMA-Factory is read as that program reads it, and says where that program is silent."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from launcher.data.formats import Chat, Labelled, Pair, Skip, Text, choose
from launcher.data.sources import find, load, records
from launcher.errors import UserError
from launcher.recipe.schema import Source

USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "Me."}
HUMAN, GPT = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.fixture
def registry(tmp_path):
    """registry(entry, records) -> (examples, Counter of notes and reasons, format) of an entry named x."""

    def read(entry, found, **source):
        (tmp_path / "x.json").write_text(json.dumps(found))
        (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **entry}}))
        listing = find(Source(path=f"{tmp_path}/dataset_info.json#x", **source))
        (table,) = load(listing, tmp_path / "scratch")
        rows = records(table, 0, len(table), "x.json")
        form = choose(listing.source, table.column_names, rows[0])
        told, examples = Counter(), []
        for row in rows:
            try:
                examples.append(form.read(row, lambda reason: told.update([reason])))
            except Skip as skip:
                told[str(skip)] += 1
        return examples, told, form

    return read


def test_an_entry_without_columns_has_the_defaults(registry):
    alpaca = {"instruction": "Who?", "input": "", "output": "Me.", "history": [["a", "b"]]}
    examples, told, _ = registry({}, [alpaca])
    assert examples == [Chat([USER, ANSWER])]
    assert told == {"column history is not read: the entry's `columns` does not name it": 1}  # history has no default
    assert registry({"formatting": "sharegpt"}, [{"conversations": [HUMAN, GPT]}])[0] == [Chat([USER, ANSWER])]


def test_columns_that_are_given_name_all_that_is_read_and_the_rest_is_counted(registry):
    rows = [
        {"q": "Who?", "input": "x", "a": "Me.", "tools": "[]"},
        {"q": "Who?", "input": "", "a": "Me.", "tools": "[1]"},
    ]
    examples, told, form = registry({"columns": {"prompt": "q", "response": "a"}}, rows)
    assert examples == [Chat([USER, ANSWER])] * 2
    assert told == {
        "column input is not read: the entry's `columns` does not name query": 1,
        "column tools is not read: the entry's `columns` does not name it": 1,
    }
    assert form.said == "read as alpaca (prompt: q, response: a); not read: input, tools"


def test_alpaca_takes_system_history_ranking_labels_and_text_to_pretrain_on(registry):
    columns = {"prompt": "p", "response": "r", "history": "h", "system": "s"}
    row = {"p": "Who?", "r": "Me.", "h": [["a", "b"]], "s": "Be brief."}
    roles = [m["role"] for m in registry({"columns": columns}, [row])[0][0].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    ranked = {"ranking": True, "columns": {"prompt": "p", "chosen": "c", "rejected": "r"}}
    ((pair,), _, form) = registry(ranked, [{"p": "Who?", "c": "Me.", "r": "You."}])
    assert pair == Pair(Chat([USER, ANSWER]), Chat([USER, {"role": "assistant", "content": "You."}]))
    assert (form.name, form.conversational) == ("preference", True)
    labelled = {"columns": {"prompt": "p", "response": "r", "kto_tag": "k"}}
    assert registry(labelled, [{"p": "Who?", "r": "Me.", "k": False}])[0] == [Labelled(Chat([USER, ANSWER]), False)]
    assert registry({"columns": {"prompt": "p"}}, [{"p": "words"}])[0] == [Text("words")]


def test_sharegpt_leaves_out_records_whose_turns_do_not_alternate(registry):
    turns = [[HUMAN, GPT], [HUMAN, HUMAN, GPT], [GPT, HUMAN], [HUMAN], [HUMAN, GPT, HUMAN], []]
    examples, told, _ = registry({"formatting": "sharegpt"}, [{"conversations": t} for t in turns])
    assert examples == [Chat([USER, ANSWER])]
    assert told == {
        "turns do not alternate between user or observation and assistant or function, from the user on": 2,
        "the last turn is not the assistant's": 2,
        "the conversation has no turn": 1,
    }


def test_sharegpt_with_tools_calls_and_a_system_turn(registry):
    call = json.dumps({"name": "f", "arguments": {"a": 1}})
    turns = [
        {"from": "system", "value": "S"}, HUMAN, {"from": "function_call", "value": call},
        {"from": "observation", "value": "1"}, GPT,
    ]  # fmt: skip
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "t", "system": "s"}}
    row = {"conversations": turns, "t": json.dumps([{"name": "f"}]), "s": "never"}
    ((chat,), told, _) = registry(entry, [row])
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[0]["content"] == "S"
    assert chat.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]
    assert not told


def test_tags_that_are_given_name_all_roles_and_a_warning_says_so(registry):
    entry = {"formatting": "sharegpt", "columns": {"messages": "m"}, "tags": OPENAI_TAGS}
    rows = [{"m": [USER, ANSWER]}, {"m": [{"role": "system", "content": "S"}, USER, ANSWER]}]
    examples, told, form = registry(entry, rows)
    assert examples == [Chat([USER, ANSWER])]
    assert sum(told.values()) == 1
    assert "`tags` does not name observation_tag, function_tag, system_tag" in form.warnings[0]
    assert len(registry({**entry, "tags": {**OPENAI_TAGS, "system_tag": "system"}}, rows)[0]) == 2


def test_openai_counts_results_that_follow_each_other_as_one_turn_and_adds_no_line(registry):
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}
    result = {"role": "tool", "content": "1"}
    tags = {**OPENAI_TAGS, "observation_tag": "tool", "system_tag": "system"}
    entry = {"formatting": "openai", "columns": {"messages": "m"}, "tags": tags}
    ((chat,), told, form) = registry(entry, [{"m": [USER, calls, result, result, ANSWER]}])
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert not told
    assert any("'detailed thinking off'" in warning for warning in form.warnings)


def test_ranking_of_sharegpt_takes_single_messages(registry):
    entry = {
        "formatting": "sharegpt", "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }  # fmt: skip
    other = {"from": "gpt", "value": "You."}
    rows = [
        {"conversations": [HUMAN], "chosen": GPT, "rejected": other},
        {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": other},
    ]
    examples, told, _ = registry(entry, rows)
    assert examples == [Pair(Chat([USER, ANSWER]), Chat([USER, {"role": "assistant", "content": "You."}]))]
    assert told == {"the last turn is not the user's": 1}


def test_num_samples_draws_the_same_each_time_and_repeats_where_there_are_too_few(registry):
    rows = [{"instruction": f"{i}", "input": "", "output": "a"} for i in range(8)]
    some, again = (registry({"num_samples": 3}, rows) for _ in range(2))
    assert len(some[0]) == 3
    assert some[0] == again[0]
    assert "3 records are drawn by chance (num_samples)" in some[2].warnings[0]
    many = [example.messages[0]["content"] for example in registry({"num_samples": 11}, rows)[0]]
    assert (len(many), set(many)) == (11, {str(i) for i in range(8)})


def test_where_the_records_lie(tmp_path):
    entries = {
        "hub": {"hf_hub_url": "org/x", "ms_hub_url": "org/y", "subset": "en", "split": "test", "folder": "python"},
        "folder": {"file_name": "parts"}, "glob": {"file_name": "parts/*.jsonl", "split": "train"},
        "cloud": {"cloud_file_name": "memory://none/a.json"},
    }  # fmt: skip
    (tmp_path / "info.json").write_text(json.dumps(entries))
    (tmp_path / "parts").mkdir()
    for name in "ab":
        (tmp_path / "parts" / f"{name}.jsonl").write_text("{}\n")
    hub = find(Source(path=f"{tmp_path}/info.json#hub"))
    assert (hub.kind, hub.source.path, hub.source.subset, hub.source.split) == ("hub", "org/x", "en", "test")
    assert hub.source.folder == "python"
    for name in ("folder", "glob"):
        assert [n[-7:] for n in find(Source(path=f"{tmp_path}/info.json#{name}")).names] == ["a.jsonl", "b.jsonl"]
    assert find(Source(path=f"{tmp_path}/info.json#hub#50")).source.max_samples == 50
    with pytest.raises(UserError, match=r"memory://none/a.json: no such file"):
        find(Source(path=f"{tmp_path}/info.json#cloud"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ms_hub_url": "a/b"}, "info.json#x: ms_hub_url = a/b: ModelScope is not read here"),
        ({"script_url": "x"}, "info.json#x: script_url = x: a loading script is not read here"),
        ({}, "info.json#x: says not where the data lie"),
        ({"file_name": "a", "formating": "x"}, r"unknown key formating, expected .*Did you mean 'formatting'\?"),
        ({"file_name": "a", "formatting": "chatml"}, "formatting = chatml: expected alpaca, sharegpt or openai"),
        (
            {"file_name": "a", "columns": {"images": "images"}},
            r"holds images \(column images\), but this trains on text",
        ),
        ({"file_name": "a", "columns": {"promt": "x"}}, r"columns.promt: expected .*Did you mean 'prompt'\?"),
        ({"file_name": "a", "tags": {"role": "x"}}, r"tags.role: expected role_tag"),
        ({"file_name": "a", "num_samples": 0}, "num_samples = 0: expected a whole number of 1 or more"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused(entry, message, tmp_path):
    (tmp_path / "info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(UserError, match=message):
        find(Source(path=f"{tmp_path}/info.json#x"))


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("dataset_info.json", {}, "is a registry of data sets; name one as dataset_info.json#name: identity, other"),
        ("dataset_info.json#identty", {}, r"has no entry 'identty'; .*Did you mean 'identity'\?"),
        ("none.json#x", {}, "none.json: cannot be read: No such file"),
        ("dataset_info.json#identity", {"columns": {"prompt": "q"}}, "columns stands in the entry of the registry"),
        ("dataset_info.json#identity", {"format": "alpaca"}, "format = alpaca: the registry's entry says it"),
    ],
)
def test_a_name_that_the_registry_has_not_lists_those_it_has(path, source, message, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "a"}, "other": {}}))
    with pytest.raises(UserError, match=message):
        find(Source(path=f"{tmp_path}/{path}", **source))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"columns": {"response": "output"}},
            r"`columns` names no prompt, and what a given `columns` does not name is null",
        ),
        ({"columns": {"prompt": "q"}}, "columns.prompt = q: the file has no such column, it has instruction, output"),
        (
            {"formatting": "sharegpt", "tags": {"role_tag": "role"}, "columns": {"messages": "output"}},
            "names no content_tag",
        ),
        ({"ranking": True}, "`columns` names no chosen"),
    ],
)
def test_an_entry_that_does_not_fit_its_file_says_what_it_names(entry, message, registry):
    with pytest.raises(UserError, match=message):
        registry(entry, [{"instruction": "a", "output": "b"}])
