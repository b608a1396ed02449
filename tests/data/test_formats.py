"""Records of every format become the same conversation; what cannot be read is refused with column or turn."""

from __future__ import annotations

import json

import pytest

from launcher.data.formats import Chat, Completion, Labelled, Pair, Skip, Text, choose
from launcher.errors import UserError
from launcher.recipe.schema import Source

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "Me."}
OTHER = {"role": "assistant", "content": "You."}
CHAT = Chat([SYSTEM, USER, ANSWER])
TAGGED = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
TOOL = {"name": "add", "parameters": {}}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def form_of(record, **source):
    return choose(Source(path="f.jsonl", **source), list(record), record)


def read(record, **source):
    return form_of(record, **source).read(record)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": CHAT.messages}, "messages"),
        ({"conversations": CHAT.messages}, "messages"),
        ({"conversation": CHAT.messages, "id": 1}, "messages"),
        ({"messages": json.dumps(CHAT.messages)}, "messages"),
        ({"messages": [USER, ANSWER], "system": "Be brief."}, "messages"),
        ({"conversations": TAGGED}, "sharegpt"),
        ({"messages": TAGGED}, "sharegpt"),
        ({"conversations": TAGGED[1:], "system": "Be brief."}, "sharegpt"),
        ({"conversations": TAGGED, "system": "Be long."}, "sharegpt"),  # the first turn outranks the column
        ({"instruction": "Who?", "input": "", "output": "Me.", "system": "Be brief."}, "alpaca"),
        ({"instruction": "", "input": "Who?", "output": "Me.", "system": "Be brief."}, "alpaca"),
        ({"query": "Who?", "response": "Me.", "system": "Be brief."}, "query_response"),
        ({"question": "Who?", "answer": "Me.", "system_prompt": "Be brief."}, "query_response"),
        ({"problem": "Who?", "solution": "Me.", "system": "Be brief."}, "query_response"),
        ({"instruction": "Who?", "response": "Me.", "system": "Be brief."}, "query_response"),
        ({"conversation": [{"human": "Who?", "assistant": "Me."}], "system": "Be brief."}, "query_response"),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"prompt": [SYSTEM, USER], "completion": "Me."}, "prompt_completion"),
    ],
)
def test_every_chat_format_is_recognised_and_becomes_the_same_conversation(record, name):
    form = form_of(record)
    assert (form.name, form.recognised) == (name, True)
    assert form.read(record) == CHAT
    assert form_of(record, format=name).read(record) == CHAT


@pytest.mark.parametrize("role", ["gpt", "assistant", "chatgpt", "model", "bard", "bing"])
def test_every_name_of_the_assistant_is_known(role):
    turns = [{"from": "human", "value": "Who?"}, {"from": role, "value": "Me."}]
    assert read({"conversations": turns}) == Chat([USER, ANSWER])


def test_alpaca_joins_instruction_and_input_and_puts_the_history_first():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert [m["content"] for m in read(record).messages] == ["Hi", "Hello", "Add.\n1 and 2", "3"]
    renamed = {"instruction": "Add.", "input": "1 and 2", "response": "3"}
    assert [m["content"] for m in read(renamed).messages] == ["Add.\n1 and 2", "3"]
    with pytest.raises(UserError, match="column history: entry 0 is not a pair"):
        read({**record, "history": [["Hi"]]})


def test_completions_and_text_are_recognised():
    assert read({"prompt": "a", "completion": "b"}) == Completion("a", "b")
    assert read({"text": "a", "url": "b"}) == Text("a")
    assert read({"content": "a", "title": "b"}) == Text("a")
    form = form_of({"text": "a", "url": "b"})
    assert form.said == "recognised as text; not read: url"
    assert not form.conversational


def test_a_text_that_is_the_record_itself_written_out_is_no_other_format():
    record = {"instruction": "Who?", "input": "", "output": "Me.", "text": "### Instruction: Who? ### Response: Me."}
    form = form_of(record)
    assert form.name == "alpaca"
    assert "column text is the same record as one text" in form.warnings[0]


def test_columns_that_begin_after_the_first_record_are_read_or_told():
    first, later = (
        {"question": "Who?", "answer": "Me."},
        {"question": "Who?", "answer": "Me.", "system_prompt": "Be brief."},
    )
    notes = []
    assert choose(Source(path="f"), [*later], first).read(later, notes.append) == CHAT
    assert not notes
    assert choose(Source(path="f"), [*first], first).read(later, notes.append) == Chat([USER, ANSWER])
    assert notes == ["column system_prompt is not read"]


def test_tools_calls_and_results_become_openais_form():
    call = {"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": {"sum": 1}, "tool_call_id": "c1"},
        ANSWER,
    ]  # fmt: skip
    chat = read({"messages": turns, "tools": json.dumps([TOOL])})
    assert chat.tools == [{"type": "function", "function": TOOL}]
    assert chat.messages[1]["tool_calls"] == [{"id": "c1", **ADD}]
    assert chat.messages[2] == {"role": "tool", "content": '{"sum": 1}', "tool_call_id": "c1"}
    assert read({"messages": turns, "tools": chat.tools}).tools == chat.tools
    assert read({"messages": turns, "tools": TOOL}).tools == chat.tools
    assert read({"messages": turns, "tools": [json.dumps(TOOL)]}).tools == chat.tools
    assert read({"messages": [USER, ANSWER], "tools": "[]"}).tools is None


def test_function_calls_and_observations_of_sharegpt_become_tool_calls_and_results():
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [
        {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": call},
        {"from": "function_call", "value": f"[{call}]"}, {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Me."},
    ]  # fmt: skip
    expected = [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [ADD, ADD]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    assert read({"conversations": turns}).messages == expected
    names = {"function_call": "tool_call", "observation": "tool_response", "gpt": "assistant", "human": "user"}
    swift = [{"role": names[turn["from"]], "content": turn["value"]} for turn in turns]
    assert read({"messages": swift}).messages == expected


def test_parts_of_text_are_joined_and_reasoning_calls_and_results_among_them_found():
    answer = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "M"}, {"type": "text", "text": "e."}]
    calls = [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}]
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}]}]
    turns = [
        {"role": "user", "content": [{"type": "text", "value": "Who?"}]}, {"role": "assistant", "content": calls},
        {"role": "user", "content": results}, {"role": "assistant", "content": answer},
    ]  # fmt: skip
    assert read({"messages": turns}).messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **ADD}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {**ANSWER, "reasoning_content": "hm"},
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"train": False}, {"train": False}),
        ({"loss": True}, {"train": True}),
        ({"loss": 0.5}, {"weight": 0.5}),
        ({"loss_weight": 2}, {"weight": 2.0}),
        ({"weight": 0}, {"weight": 0.0}),
        ({"reasoning": "hm"}, {"reasoning_content": "hm"}),
        ({"train": None, "weight": None, "id": 3}, {}),
    ],
)
def test_what_a_message_says_of_its_training_is_kept(given, kept):
    assert read({"messages": [USER, {**ANSWER, **given}]}).messages[1] == {**ANSWER, **kept}


PAIR = Pair(Chat([USER, ANSWER]), Chat([USER, OTHER]))


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "prompt": "Who?"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Who?", "chosen": [ANSWER], "rejected": [OTHER]},
        {"messages": [USER], "chosen": "Me.", "rejected": "You."},
        {"messages": [USER], "chosen": ANSWER, "rejected": OTHER},
        {"messages": [USER, ANSWER], "rejected_response": "You."},
        {"messages": [USER, ANSWER], "rejected_response": [OTHER]},
        {"messages": [USER, ANSWER], "rejected_messages": [USER, OTHER]},
        {"chosen_messages": [USER, ANSWER], "rejected_messages": [USER, OTHER]},
        {"conversations": [TAGGED[1]], "chosen": TAGGED[2], "rejected": {"from": "gpt", "value": "You."}},
        {"conversations": [TAGGED[1]], "chosen": ANSWER, "rejected": OTHER},
        {"instruction": "Who?", "input": "", "chosen": "Me.", "rejected": "You."},
        {"instruction": "Who?", "input": "", "output": ["Me.", "You."]},
        {"question": "Who?", "chosen": "Me.", "rejected": "You."},
        {"question": "Who?", "response_j": "Me.", "response_k": "You."},
        {"query": "Who?", "response": "Me.", "rejected_response": "You."},
        {"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": "\n\nHuman: Who?\n\nAssistant: You."},
    ],
)
def test_pairs_of_every_shape_become_the_same_pair(record):
    form = form_of(record)
    assert form.name == "preference"
    assert form.read(record) == PAIR
    assert form_of(record, format="preference").read(record) == PAIR


def test_a_pair_of_texts_is_a_pair_of_completions_and_context_is_not_trained():
    record = {"prompt": "Who?", "chosen": " Me.", "rejected": " You."}
    assert read(record) == Pair(Completion("Who?", " Me."), Completion("Who?", " You."))
    talk = [USER, ANSWER, USER]
    pair = read({"messages": talk, "chosen": "Me.", "rejected": "You."})
    assert [m.get("train") for m in pair.rejected.messages] == [None, False, None, None]


def test_labelled_answers_of_every_shape():
    assert read({"messages": [USER, ANSWER], "label": True}) == Labelled(Chat([USER, ANSWER]), True)
    assert read({"prompt": "a", "completion": "b", "label": False}) == Labelled(Completion("a", "b"), False)
    alpaca = {"instruction": "Who?", "output": "Me.", "kto_tag": "false"}
    assert read(alpaca, format="unpaired") == Labelled(Chat([USER, ANSWER]), False)
    talk = read({"messages": [USER, ANSWER, USER, OTHER], "label": True}).example.messages
    assert [m.get("train") for m in talk] == [None, False, None, None]


def test_tokens_come_as_they_stand_without_padding_and_with_their_mask():
    record = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    tokens = read(record)
    assert (tokens.ids.tolist(), tokens.weights.tolist()) == ([5, 6, 7], [0, 1, 1])
    weighted = read({"input_ids": [5, 6], "loss_mask": [0.5, 2]})
    assert weighted.weights.tolist() == [0.5, 2]
    assert read({"input_ids": [5, 6]}).weights.tolist() == [1, 1]


def test_columns_map_our_names_to_the_files():
    assert read({"q": "a", "a": "b"}, columns={"prompt": "q", "completion": "a"}) == Completion("a", "b")
    assert read({"body": "a"}, format="text", columns={"text": "body"}) == Text("a")
    assert read({"talk": CHAT.messages}, columns={"messages": "talk"}) == CHAT
    assert read({"talk": TAGGED}, format="sharegpt", columns={"conversations": "talk"}) == CHAT
    assert (
        read({"a": "Who?", "b": "Me.", "c": "Be brief."}, columns={"query": "a", "response": "b", "system": "c"})
        == CHAT
    )


def test_tags_name_other_roles():
    record = {"conversations": [{"who": "Q", "says": "a"}, {"who": "A", "says": "b"}]}
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    for name in ("sharegpt", "messages"):
        assert [m["role"] for m in read(record, format=name, tags=tags).messages] == ["user", "assistant"]
    assert read(record, tags=tags).messages[1] == {"role": "assistant", "content": "b"}


def test_placeholders_are_filled_where_the_recipe_names_them_and_told_where_not():
    record = {"instruction": "Who?", "output": "{{name}} of {{ author }}, {{x}}"}

    def answer(placeholders):
        notes = []
        form = choose(Source(path="f.jsonl"), list(record), record, placeholders)
        return form.read(record, notes.append).messages[1]["content"], notes

    filled, notes = answer({"name": "Ada", "author": "Grace"})
    assert filled == "Ada of Grace, {{x}}"
    assert notes == ["holds a {{placeholder}} that data.placeholders does not name, left as it stands"]
    assert answer({"name": "Ada", "author": "Grace", "x": "1"})[1] == []
    left, notes = answer({})
    assert left == record["output"]
    assert notes[0].startswith("holds {{name}} or {{author}}, left as it stands")


@pytest.mark.parametrize(
    ("record", "source", "message"),
    [
        ({"instruction": "a", "output": "b", "text": "c"}, {}, "fit several formats: alpaca, text"),
        ({"messages": CHAT.messages, "text": "c"}, {}, "fit several formats: messages, text"),
        (
            {"problem": "a", "solution": "b", "answer": "c"},
            {},
            r"columns: \{response: answer\} or columns: \{response: s",
        ),
        ({"q": "a", "a": "b"}, {}, r"set format: query_response, columns: \{query: q, response: a\}"),
        ({"body": "a", "n": 1}, {}, r"set format: text, columns: \{text: body\}"),
        (
            {"instruction": "a", "context": "b", "response": "c"},
            {},
            r"set format: alpaca, columns: \{instruction: instruction, input: context, output: response\}",
        ),
        ({"messages": []}, {}, "Column messages of the first record is empty"),
        ({"segments": [{"label": True, "text": "a"}]}, {}, "holds texts with labels .Axolotl's input_output."),
        ({"dialogue": CHAT.messages}, {}, r"set columns: \{messages: dialogue\}"),
        ({"talk": [{"who": "a", "says": "b"}]}, {}, r"tags: \{role_tag: who, content_tag: says\}"),
        ({"chosen": "x", "rejected": "y"}, {}, r"follow no prompt: say columns: \{prompt: its column\}"),
        (
            {"messages": CHAT.messages, "label": 1},
            {},
            "column label is 1: where it judges answers, make it true or false",
        ),
        ({"n": 1}, {}, "columns n fit no format .messages: messages; .*tokens: input_ids"),
        (
            {"text": "a"},
            {"columns": {"text": "txt"}},
            "columns.text = txt: the first record has no such column, it has text",
        ),
        (
            {"text": "a"},
            {"format": "text", "columns": {"txt": "a"}},
            "columns.txt: format text has no such column.*'text'",
        ),
        ({"text": "a"}, {"format": "preference"}, "columns text do not make format preference: expected chosen"),
        ({"text": "a"}, {"format": "text", "tags": {"role_tag": "a"}}, "tags are for formats of messages, not text"),
        ({"messages": CHAT.messages}, {"format": "messages", "tags": {"role": "a"}}, "tags.role: expected role_tag"),
        ({"instruction": "a", "output": None}, {}, r"column output is null \(the record has instruction\)"),
        ({"instruction": "a", "output": 3}, {}, "column output is a number, expected text"),
        ({"messages": [{"role": "robot", "content": "a"}]}, {}, "turn 1: unknown role 'robot', expected system"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "turn 1: 'content' is null, expected text"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "turn 1: 'content' is a number, expected text"),
        ({"messages": [{**USER, "images": ["a.jpg"]}]}, {}, "turn 1: 'images' is not supported; this trains on text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "holds a part of type 'image_url'"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, {}, "turn 2: 'train' is 'no', expected true or false"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, {}, "turn 2: 'weight' is -1, expected a number of 0 or more"),
        ({"messages": [{**USER, "reasoning": "x"}]}, {}, "turn 1: only an assistant turn has 'reasoning'"),
        ({"messages": [{"role": "tool", "content": "1"}]}, {}, "turn 1: a tool result must follow an assistant turn"),
        ({"messages": [USER, {"role": "tool_call", "content": '{"name"'}]}, {}, "turn 2: the tool call is not JSON"),
        ({"messages": [USER, {"role": "tool_call", "content": "[]"}]}, {}, "turn 2: .* the list of calls is empty"),
        ({"messages": [USER, {"role": "tool_call", "content": "{}"}]}, {}, "turn 2: tool call 1: {} has no name"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "a", "arguments": "[1]"}]}]},
            {},
            "arguments are a list",
        ),
        ({"messages": CHAT.messages, "tools": "{"}, {}, "column tools is not JSON"),
        (
            {"messages": CHAT.messages, "tools": [{"x": 1}]},
            {},
            "column tools: .* is no tool: expected an object with a name",
        ),
        ({"text": "a", "tools": [TOOL]}, {}, "column tools is not read by format text"),
        ({"messages": "a"}, {"format": "messages"}, "column messages is text, expected a list of messages"),
        ({"messages": CHAT.messages, "images": ["a.jpg"]}, {}, "column images is not supported: this trains on text"),
        ({"messages": [USER], "chosen": "a", "rejected": None}, {}, "column rejected is null"),
        ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "x"}, OTHER]}, {}, "part at turn 1, which is not"),
        ({"messages": [USER, ANSWER], "chosen": "a", "rejected": "b"}, {}, "turn 2 is the assistant's, and chosen and"),
        ({"messages": [USER, ANSWER], "label": 1}, {"format": "unpaired"}, "column label is 1, expected true"),
        ({"messages": [USER], "label": True}, {}, "the label judges the last turn, but that is not the assistant's"),
        ({"input_ids": [1, -2]}, {}, "token ids are whole numbers from 0, here from -2 to 1"),
        ({"input_ids": [1, "a"]}, {}, "column input_ids is no flat list of numbers: it holds text"),
        ({"input_ids": [1, 2], "labels": [1]}, {}, "column labels has 1 entries, but input_ids has 2 tokens"),
        (
            {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
            {},
            r"label 2 at place 0 is neither the token id there \(1\)",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(record, source, message):
    with pytest.raises(UserError, match=message):
        read(record, **source)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
        ({"instruction": "a", "output": ""}, "an assistant turn is empty"),
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, "chosen and rejected are the same"),
        ({"messages": [USER], "chosen": "x", "rejected": ""}, "an answer is empty"),
        ({"input_ids": []}, "empty"),
    ],
)
def test_what_cannot_be_learnt_from_is_left_out_under_a_reason(record, reason):
    with pytest.raises(Skip, match=reason):
        read(record)


def test_an_empty_turn_that_is_not_trained_is_kept():
    turns = [USER, {"role": "assistant", "content": "", "train": False}, USER, ANSWER]
    assert read({"messages": turns}).messages == turns


def test_a_later_record_of_another_kind_is_not_learnt_as_if_it_were_the_first():
    form = form_of({"messages": CHAT.messages})
    with pytest.raises(
        UserError, match=r"column rejected judges answers, but the first record was recognised as messages"
    ):
        form.read({"messages": CHAT.messages, "rejected": "You."})
    with pytest.raises(UserError, match=r"column messages is missing .the record has text."):
        form.read({"text": "a"})
