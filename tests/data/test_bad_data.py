"""Bad data, end to end through `prepare`: each is an error with file, place, reason and fix, or a counted drop.

Nothing is left out, repaired or guessed without a word: what is dropped or left as it stands is counted by reason, and
`strict` makes the first of it an error.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.prepare import prepare
from launcher.errors import UserError
from launcher.recipe.schema import from_dict
from tests.data.make import CHATML, tiny_tokenizer

USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "Me."}
GOOD = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
SECOND = r"a.jsonl: record 1 \(row 2\)"
LINE = rf"{SECOND}, line 2"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """prepared(content, name, source keys, data keys) -> the train entry of what `prepare` made of the file."""

    def run(content: Any, name: str = "a.jsonl", *, tokenizer: Path = tokenizer, strict: bool = False, **data: Any):
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        source = {"path": str(tmp_path / name), **data.pop("source", {})}
        recipe = {
            "model": {"config": {"model_type": "llama", "vocab_size": 400}, "tokenizer": str(tokenizer)},
            "data": {
                "train": [source], "seq_len": 64, "num_workers": 1, "cache_dir": str(tmp_path / "cache"), **data
            },
            "train": {"global_batch_size": 4, "epochs": 1},
        }  # fmt: skip
        return prepare(from_dict(recipe), strict=strict).train

    return run


def calls(arguments: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def second(**changes: Any) -> list[Any]:
    """A good conversation, then one whose question or answer is changed."""
    return [GOOD, {"messages": [{**USER, **changes.pop("user", {})}, {**ANSWER, **changes}]}]


FILES: dict[str, tuple[Any, str, str]] = {  # what is wrong -> content, file name, message
    "a broken line": ('{"text": "a"}\n{"text": "b"\n', "a.jsonl", rf"{LINE}: not JSON: Expecting ',' delimiter"),
    "a line cut short": ('{"text": "a"}\n{"text": "b', "a.jsonl", rf"{LINE}: not JSON: Unterminated string"),
    "a line that is a number": ('{"text": "a"}\n3\n', "a.jsonl", rf"{LINE}: a record is an object .* not int"),
    "a line that is a list": ('{"text": "a"}\n[1]\n', "a.jsonl", rf"{LINE}: a record is an object .* not list"),
    "a list cut short": ('[{"text": "a"},\n{"text": "b"},\n{"te', "a.json", "a.json: line 3: not JSON: .*ends in the"),
    "a list with a comma too many": ('[{"text": "a"},\n]', "a.json", "a.json: line 2: not JSON: "),
    "text behind a list": ('[{"text": "a"}]\nx', "a.json", "a.json: line 2: not JSON: 'x' follows the end of the list"),
    "records over several lines": ('{\n"text": "a"\n}\n{\n"text": "b"\n}', "a.jsonl", "line 4: .*Write a record on a"),
    "an object around the records": ('{\n"a": [{"text": "a"}]}', "a.json", r"is one object \(a\), expected a list of"),
    "records under a split": ('{"train": [{"text": "a"}]}', "a.json", "If column train holds the records, make the fi"),
    "bad UTF-8": (b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl", rf"{LINE}: not UTF-8: .*Save the file as UTF-8"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "a.jsonl", "a.jsonl: is UTF-16 text, not UTF-8 text. Rename it"),
    "a NUL byte among JSON": ('{"text": "a"}\n' * 400 + '{"text": "\0"}', "a.jsonl", r"row 401\), line 401: not JSON:"),
    "a NUL byte among lines": ("word\n" * 1000 + "a\0b", "a.txt", r"a.txt: record 1000 \(row 1001\), .*holds a NUL by"),
    "a NUL byte in csv": ("text\n" + "word\n" * 9 + "a\0b\n", "a.csv", r"a.csv: record 9 \(row 10\), line 11: holds a"),
    "half a character": ('{"text": "a"}\n{"text": "\\ud83d"}', "a.jsonl", rf"{LINE}: holds one half of a .ud... pair"),
    "a binary file": (b"\x89PNG\r\n\x1a\n\0\0", "a.jsonl", "a.jsonl: holds NUL bytes, so it is no UTF-8 text but a bi"),
    "gzip by another name": (gzip.compress(b"x"), "a.json", "a.json: is compressed with gzip, .*Rename it to its true"),
    "gzip cut short": (gzip.compress(b"x" * 999)[:-9], "a.jsonl.gz", "a.jsonl.gz: cannot be uncompressed: .*ended bef"),
    "an endless nesting": ('{"a": ' + "[" * 99999, "a.jsonl", r"a.jsonl: record 0 \(row 1\), line 1: nested too deepl"),
    "parquet that is none": ("text", "a.parquet", "a.parquet: cannot be read as parquet: .*rename it to what it is"),
    "arrow that is none": ("text", "a.arrow", "a.arrow: cannot be read as arrow"),
    "a kind that is not read": ("text", "a.docx", "a.docx: cannot read '.docx' files, expected .json, .jsonl"),
    "a csv row with more values": ("a,b\n1,2\n1,2,3\n", "a.csv", r"record 1 \(row 2\), line 3: has 3 values, .*names"),
    "a csv row with fewer values": ("a,b\n1,2\n1\n", "a.csv", r"a.csv: record 1 \(row 2\), line 3: has 1 values, but"),
    "a csv quote that stays open": ('a,b\n1,"2\n', "a.csv", "a.csv: .*line 2: unexpected end of data. A quote that is"),
    "a csv column twice": ("text,text\na,b\n", "a.csv", "a.csv: line 1: the header names column text twice"),
    "a csv that is not UTF-8": (b"text\n\xe9\n", "a.csv", "a.csv: cannot be read as csv: line 2: not UTF-8"),
    "an empty file": ("", "a.jsonl", "a.jsonl: holds no records"),
    "an empty list": ("[]", "a.json", "a.json: holds no records"),
    "a csv with a header alone": ("text\n", "a.csv", "a.csv: holds no records"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", FILES)
def test_a_file_that_cannot_be_read_is_named_with_the_place_and_the_reason(wrong, prepared):
    content, name, message = FILES[wrong]
    with pytest.raises(UserError, match=message):
        prepared(content, name)


RECORDS: dict[str, tuple[list[Any], str]] = {  # what is wrong -> records, message
    "a column of another name": ([{"body": "a"}], r"columns body fit no format.*set format: text, columns: \{text: bo"),
    "two formats at once": ([{**GOOD, "text": "a"}], "columns messages, text fit several formats: messages, text. Set"),
    "mixed schemas": ([{"text": "a"}, PAIR], rf"{SECOND}: column rejected is not in the first records|{SECOND}: colum"),
    "mixed formats": ([{"text": "a"}, {"prompt": "a", "completion": "b"}], rf"{SECOND}: column text is missing \(the"),
    "a column that is null": ([GOOD, {"messages": None, "id": 3}], rf"{SECOND}: column messages is null .the record h"),
    "a column of another type": ([{"text": "a"}, {"text": 5}], rf"{SECOND}: column text is a number, expected text"),
    "messages that are text": ([GOOD, {"messages": "Who?"}], rf"{SECOND}: column messages is text, expected a list"),
    "a null among messages": ([GOOD, {"messages": [None, ANSWER]}], rf"{SECOND}: turn 1: is null, expected a message"),
    "no role": (second(user={"role": None}), rf"{SECOND}: turn 1: 'role' is null or missing, expected one of"),
    "an unknown role": (second(user={"role": "robot"}), rf"{SECOND}: turn 1: unknown role 'robot', expected system.*t"),
    "null content": (second(user={"content": None}), rf"{SECOND}: turn 1: 'content' is null, expected text"),
    "content that is a number": (second(content=3), rf"{SECOND}: turn 2: 'content' is a number, expected text"),
    "an image": ([GOOD, {**GOOD, "images": ["a.jpg"]}], rf"{SECOND}: column images is not supported: this trains on t"),
    "an image in a message": (second(images=["a.jpg"]), rf"{SECOND}: turn 2: 'images' is not supported"),
    "an image as a part": (
        second(user={"content": [{"type": "image_url", "image_url": {"url": "a"}}]}),
        rf"{SECOND}: turn 1: the content holds a part of type 'image_url', but this trains on text",
    ),
    "the assistant begins": ([GOOD, {"messages": [ANSWER, USER]}], rf"{SECOND}: turn 1: the conversation begins with"),
    "a result of nothing": ([GOOD, {"messages": [USER, {"role": "tool", "content": "1"}]}], rf"{SECOND}: turn 2: a to"),
    "a tool call cut short": ([GOOD, calls('{"a": ')], rf"{SECOND}: turn 2: tool call 1: arguments is not JSON"),
    "arguments that are a list": ([GOOD, calls("[1]")], rf"{SECOND}: turn 2: tool call 1: arguments are a list, expec"),
    "calls that the template drops": ([GOOD, calls("{}")], rf"{SECOND}: turn 2: the chat template does not write the"),
    "tools that the template drops": ([GOOD, {**GOOD, "tools": [TOOL]}], rf"{SECOND}: the chat template does not writ"),
    "tools that are not JSON": ([GOOD, {**GOOD, "tools": "[{"}], rf"{SECOND}: column tools is not JSON"),
    "tools in text": ([{"text": "a"}, {"text": "a", "tools": [TOOL]}], rf"{SECOND}: column tools is not read by forma"),
    "train that is text": (second(train="no"), rf"{SECOND}: turn 2: 'train' is 'no', expected true or false"),
    "a negative weight": (second(weight=-1), rf"{SECOND}: turn 2: 'weight' is -1, expected a number of 0 or more"),
    "a history of three": (
        [{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}],
        r"a.jsonl: record 0 \(row 1\): column history: entry 0 is not a pair of texts",
    ),
    "a label that is a number": ([{**GOOD, "label": 1}], "column label is 1: where it judges answers, make it true or"),
    "a label that is a word": ([{**GOOD, "label": True}, {**GOOD, "label": "x"}], rf"{SECOND}: column label is 'x', e"),
    "no rejected answer": ([PAIR, {"prompt": "a", "chosen": "b"}], rf"{SECOND}: column rejected is missing \(the reco"),
    "other questions": (
        [{"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "What?"}, ANSWER]}],
        r"a.jsonl: record 0 \(row 1\): chosen: chosen and rejected part at turn 1, which is not the assistant's",
    ),
    "ids that are not whole": ([{"input_ids": [1, 2.5]}], r"record 0 \(row 1\): column input_ids: token ids are whole"),
    "ids below 0": ([{"input_ids": [1, -5]}], r"record 0 \(row 1\): column input_ids: .*here from -5 to 1"),
    "ids beyond the vocabulary": ([{"input_ids": [1, 2]}, {"input_ids": [1, 70000]}], rf"up to 70000 .*{SECOND}.*voca"),
    "labels of another length": ([{"input_ids": [1, 2], "labels": [1]}], r"labels has 1 entries, but input_ids has 2"),
    "labels one place early": ([{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}], r"label 2 at place 0 is neither th"),
    "a record longer than a row": ([{"text": "word " * 200}], r"1 records are longer.*\n.*a.jsonl: record 0 \(row 1\)"),
    "nothing is left": ([{"prompt": "a", "completion": ""}], r"a.jsonl: nothing is left to learn from \(.*: 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", RECORDS)
def test_a_record_that_cannot_be_learnt_from_is_named_with_its_row_and_the_reason(wrong, prepared):
    records, message = RECORDS[wrong]
    with pytest.raises(UserError, match=message):
        prepared(records)


COUNTED: dict[
    str, tuple[list[Any], str]
] = {  # what is wrong -> records of which one is left, the reason it is counted by
    "an empty answer": ([GOOD, {"messages": [USER, {**ANSWER, "content": " "}]}], "an assistant turn is empty"),
    "an empty output": ([{"instruction": "a", "output": t} for t in ("b", "")], "an assistant turn is empty"),
    "an empty completion": ([{"prompt": "a", "completion": t} for t in ("b", "")], "no trained token"),
    "an empty text": ([{"text": t} for t in ("b", "")], "empty"),
    "no answer": ([GOOD, {"messages": [USER]}], "no trained token"),
    "no turn": ([GOOD, {"messages": []}], "the conversation has no turn"),
    "no ids": ([{"input_ids": ids} for ids in ([1, 2], [])], "empty"),
    "no label": ([{"input_ids": [1, 2], "labels": t} for t in ([1, 2], [-100, -100])], "no trained token"),
    "the same answer twice": ([PAIR, {**PAIR, "rejected": "Me."}], "chosen and rejected are the same"),
    "an empty rejected answer": ([PAIR, {**PAIR, "rejected": ""}], "an answer is empty"),
    "longer than a row": ([{"text": t} for t in ("a", "word " * 200)], "longer than seq_len"),
    "a large record": ([{"text": t} for t in ("a", "0123456789 " * 50_000)], "longer than seq_len"),
}


@pytest.mark.parametrize("wrong", COUNTED)
def test_a_record_that_is_left_out_is_counted_by_its_reason_and_refused_when_strict(wrong, prepared):
    records, reason = COUNTED[wrong]
    entry = prepared(records, overlong="drop")
    assert entry["dropped"] == {reason: 1}
    assert entry["documents"] == (2 if "chosen" in records[0] else 1)
    with pytest.raises(UserError, match=rf"strict.*\n.*{reason}: 1, the first is .*{SECOND}"):
        prepared(records, overlong="drop", strict=True)


@pytest.mark.parametrize(
    ("content", "name", "documents"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\n', "a.jsonl", 1),
        (b"\xef\xbb\xbftext\nword\n", "a.csv", 1),
        (b'{"text": "a"}\r\n\r\n  \n{"text": "b"}', "a.jsonl", 2),
        (b'[{"text": "a"}]', "a.jsonl", 1),
        ('[{"text": "a", "more": "' + "x" * 5_000_000 + '"}, {"text": "b"}]', "a.json", 2),
        pytest.param('{"text": "a", "more": "' + "x" * 50_000_000 + '"}\n', "a.jsonl", 1, marks=pytest.mark.slow),
        pytest.param('[{"text": "a", "more": "' + "x" * 50_000_000 + '"}]', "a.json", 1, marks=pytest.mark.slow),
    ],
    ids=["BOM", "BOM in csv", "blank lines", "a list in .jsonl", "5 MB in a list", "a row of 50 MB", "50 MB in a list"],
)
def test_what_is_odd_but_means_one_thing_is_read(content, name, documents, prepared):
    entry = prepared(content, name)
    assert (entry["documents"], entry["dropped"], entry["changed"]) == (documents, {}, {})


def test_placeholders_that_nobody_fills_are_counted_and_refused_when_strict(prepared):
    records = [{"instruction": "Who?", "output": "{{name}} of {{where}}"}]
    assert list(prepared(records)["changed"].values()) == [1]
    left = prepared(records, placeholders={"name": "Ada"})["changed"]
    assert left == {"holds a {{placeholder}} that data.placeholders does not name, left as it stands": 1}
    assert prepared(records, placeholders={"name": "Ada", "where": "London"})["changed"] == {}
    with pytest.raises(UserError, match=r"data.placeholders says what it is: 1, the first is .*record 0 \(row 1\)"):
        prepared(records, strict=True)


def test_columns_that_nothing_reads_are_said(prepared):
    (said,) = prepared([{"question": "Who?", "answer": "Me.", "url": "x"}])["formats"]
    assert said.endswith("recognised as query_response (query: question, response: answer); not read: url")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only pairs') }}", r"a.jsonl: record 0 \(row 1\): .*only pairs"),
        ("{{ messages[0].content.nothing() }}", r"a.jsonl: record 0 \(row 1\): .*the chat template failed"),
        ("{% for m in messages", r"^data.chat_template = .*a.jinja, line 1: not a Jinja .*unexpected end of template"),
        (
            "a\n{{ messages | nofilter }}",
            r"^data.chat_template = .*a.jinja, line 2: not .*'nofilter'.* Correct",
        ),
        ("a\n{{ 1 + x.y }}", r"a.jsonl: record 0 \(row 1\): .*'x' is undefined \(.*= .*a.jinja, line 2\)\. Correct"),
    ],
    ids=["refuses", "fails", "broken", "unknown filter", "unknown name"],
)
def test_a_template_that_fails_is_named_with_its_line_and_the_record(template, message, prepared, tmp_path):
    (tmp_path / "a.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        prepared([GOOD], chat_template=str(tmp_path / "a.jinja"))


def test_special_tokens_that_the_tokenizer_lacks_are_refused_or_warned_of(prepared, tmp_path):
    with pytest.raises(UserError, match=r"data.chat_template: it writes <\|.*they would be learnt as plain text"):
        prepared([GOOD], chat_template="llama3")
    (tmp_path / "a.jinja").write_text(CHATML.replace("im_start", "turn"))
    (warning,) = prepared([GOOD], chat_template=str(tmp_path / "a.jinja"))["warnings"]
    assert "the chat template holds <|turn|>, which the tokenizer has not as special tokens" in warning


def test_a_tokenizer_without_a_template_is_refused_for_conversations(prepared, tmp_path):
    bare = tiny_tokenizer(tmp_path / "tokenizer", template=None)
    with pytest.raises(UserError, match="the tokenizer has no chat template, which conversations need"):
        prepared([GOOD], tokenizer=bare)
    assert prepared([{"text": "a"}], tokenizer=bare)["documents"] == 1


def test_what_a_registry_leaves_out_is_counted_and_a_drawn_record_is_named_by_its_row(prepared, tmp_path):
    source = {"path": f"{tmp_path}/dataset_info.json#x"}
    odd = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    fine = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    entry = {"file_name": "a.jsonl", "formatting": "sharegpt", "num_samples": 5}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    made = prepared(
        [{"conversations": turns} for turns in (fine, odd, fine)], source=source
    )  # one or two of them twice
    (reason,) = made["dropped"]
    assert reason.startswith("turns do not alternate")
    assert made["dropped"][reason] in (1, 2)
    assert any("5 records are drawn by chance" in warning for warning in made["warnings"])
    with pytest.raises(UserError, match=r"a.jsonl: record 2 \(row 3\): turn 2: 'value' is missing"):
        prepared([{"conversations": t} for t in (fine, fine, [fine[0], {"from": "gpt"}])], source=source)
