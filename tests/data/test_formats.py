"""Records of every format become the same conversation; what cannot be read is refused with column or turn."""

from __future__ import annotations

import pytest

from launcher.data.formats import Chat, Completion, Text, choose
from launcher.errors import UserError
from launcher.recipe.schema import Source

CHAT = Chat(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
    ]
)


def read(record, **source):
    return choose(Source(path="f.jsonl", **source), list(record), record).read(record)


def test_every_chat_format_is_recognised_and_becomes_the_same_conversation():
    tagged = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Me."},
    ]
    assert read({"messages": CHAT.messages}) == CHAT
    assert read({"conversations": CHAT.messages}) == CHAT
    assert read({"conversations": tagged}) == CHAT
    assert read({"conversations": tagged[1:], "system": "Be brief."}) == CHAT
    assert read({"instruction": "Who?", "input": "", "output": "Me.", "system": "Be brief."}) == CHAT


def test_alpaca_joins_instruction_and_input_and_puts_the_history_first():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert [m["content"] for m in read(record).messages] == ["Hi", "Hello", "Add.\n1 and 2", "3"]
    with pytest.raises(UserError, match="column history: entry 0 is not a pair"):
        read({**record, "history": [["Hi"]]})


def test_completions_and_text_are_recognised():
    assert read({"prompt": "a", "completion": "b"}) == Completion("a", "b")
    assert read({"text": "a", "url": "b"}) == Text("a")


def test_columns_map_our_names_to_the_files():
    assert read({"q": "a", "a": "b"}, columns={"prompt": "q", "completion": "a"}) == Completion("a", "b")
    assert read({"body": "a"}, format="text", columns={"text": "body"}) == Text("a")
    assert read({"talk": CHAT.messages}, columns={"messages": "talk"}) == CHAT


def test_tags_name_other_roles():
    record = {"conversations": [{"who": "Q", "says": "a"}, {"who": "A", "says": "b"}]}
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    roles = [m["role"] for m in read(record, format="sharegpt", tags=tags).messages]
    assert roles == ["user", "assistant"]


@pytest.mark.parametrize(
    ("record", "source", "message"),
    [
        ({"instruction": "a", "output": "b", "text": "c"}, {}, "fit several formats: alpaca, text"),
        ({"question": "a", "answer": "b"}, {}, "columns question, answer fit no format"),
        ({"messages": [], "chosen": "x", "rejected": "y"}, {}, "column chosen makes these preference records"),
        ({"messages": CHAT.messages, "label": True}, {}, "column label makes these preference records"),
        (
            {"text": "a"},
            {"format": "text", "columns": {"txt": "a"}},
            "columns.txt: format text has no such column.*'text'",
        ),
        ({"text": "a"}, {"format": "text", "tags": {"role_tag": "a"}}, "tags are for formats messages and sharegpt"),
        ({"messages": CHAT.messages}, {"format": "messages", "tags": {"role": "a"}}, "tags.role: expected role_tag"),
        ({"instruction": "a", "output": None}, {}, "column output has the value null.*the record has instruction."),
        ({"instruction": "a", "output": 3}, {}, "column output is a int, expected text"),
        ({"messages": [{"role": "robot", "content": "a"}]}, {}, "turn 1: unknown role 'robot', expected system"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "turn 1: 'content' is null, expected text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, {}, "turn 1: 'content' is a list, expected text"),
        ({"messages": [{"role": "user", "content": "a", "train": False}]}, {}, "turn 1: 'train' is not supported"),
        ({"messages": "a"}, {"format": "messages"}, "column messages is a str, expected a list of messages"),
        ({"messages": CHAT.messages, "images": ["a.jpg"]}, {}, "column images is not supported"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(record, source, message):
    with pytest.raises(UserError, match=message):
        read(record, **source)
