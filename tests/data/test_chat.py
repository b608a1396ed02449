"""The trained-token mask is proven against the template, or the turn is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.data.chat import MaskRule, render, template_of
from launcher.data.encoder import APART, Encoder
from launcher.data.formats import Chat, Completion, Text
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.errors import UserError
from tests.data.make import CHATML, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(TokenizerSpec(str(folder)))


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(tokenizer, example, *, train_on="assistant", objective="sft"):
    (group,) = groups(tokenizer, example, train_on=train_on, objective=objective)
    ((ids, weights, _),) = group.documents
    return ids, weights


def groups(tokenizer, *examples, objective="sft", **rule):
    encoder = Encoder(tokenizer, rule=MaskRule(**rule), objective=objective)
    return list(encoder.encode([(f"f: record {i}", example) for i, example in enumerate(examples)]))


def trained(tokenizer, example, **options):
    """Text of each run of trained tokens."""
    ids, weights = encode(tokenizer, example, **options)
    runs: list[list[int]] = [[]]
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def with_template(folder, template):
    return load_tokenizer(TokenizerSpec(str(folder), template=template))


def test_assistant_turns_with_their_stop_token_are_trained_and_nothing_else(tokenizer):
    chat = Chat([{"role": "system", "content": "Be brief."}, *turns("Who?", "A model.", "Sure?", "Yes.")])
    assert trained(tokenizer, chat) == ["A model.<|im_end|>", "Yes.<|im_end|>"]
    assert trained(tokenizer, chat, train_on="last_assistant") == ["Yes.<|im_end|>"]


def test_ids_are_those_of_the_tokenizers_own_template(tokenizer):
    messages = turns("Who?", "A model.\nOf two lines.", "Sure?", "Yes.")
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode(tokenizer, Chat(messages))[0].tolist() == whole
    ids, weights = encode(tokenizer, Chat(messages), train_on="all")
    assert (ids.tolist(), weights.tolist()) == (whole, [1] * len(whole))
    assert encode(tokenizer, Chat(messages), objective="pretrain")[1].all()


content = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and "<|" not in text
)


@settings(max_examples=80, deadline=None)
@example(contents=["0", ">"])  # the end of the stop token itself
@given(contents=st.lists(content, min_size=2, max_size=6))
def test_what_is_trained_decodes_to_the_assistants_words_and_stop_tokens(tokenizer, contents):
    expected = [f"{text}<|im_end|>" for text in contents[1::2]]
    assert trained(tokenizer, Chat(turns(*contents))) == expected


def test_a_template_that_writes_the_last_turn_otherwise_is_proven_by_alternatives(folder):
    forgets = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(folder, forgets)
    both = trained(tokenizer, Chat(turns("Who?", "A model.", "Sure?", "Yes.")))
    assert both == ["A model.<|im_end|>", "<think></think>Yes.<|im_end|>"]
    one = trained(tokenizer, Chat(turns("Who?", "A model.", "Sure?", "Yes.")), train_on="last_assistant")
    assert one == ["<think></think>Yes.<|im_end|>"]


def test_a_template_that_writes_what_depends_on_later_turns_is_proven_by_alternatives(folder):
    counts = "{{ messages | length }}" + CHATML
    assert trained(with_template(folder, counts), Chat(turns("Who?", "Me."))) == ["Me.<|im_end|>"]


def test_a_template_whose_generation_prompt_is_not_the_turns_beginning_is_refused(folder):
    other = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'Answer: ' }}")
    with pytest.raises(UserError, match="turn 2"):
        encode(with_template(folder, other), Chat(turns("Who?", "Me.")))


def test_a_text_is_tokenised_apart_where_a_token_would_reach_over_the_begin_of_a_turn(folder):
    plain = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = with_template(folder, plain)
    merged = next(
        (a, b)
        for a, b in [("lif", "e"), ("questi", "on"), ("Ques", "tions"), ("ti", "ny"), (" ans", "wers"), ("yo", "u")]
        if tokenizer.encode(a + b) != tokenizer.encode(a) + tokenizer.encode(b)
    )
    (group,) = groups(tokenizer, Chat(turns(*merged)))
    ids = tokenizer.encode(merged[0]) + tokenizer.encode(merged[1] + "<|im_end|>")
    assert group.documents[0][0].tolist() == ids
    assert trained(tokenizer, Chat(turns(*merged))) == [merged[1] + "<|im_end|>"]
    assert group.changed == [APART]


def test_a_template_without_a_stop_token_is_refused_with_the_fix(folder):
    endless = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match=r"turn 2: .* writes no stop token .* Add \{\{ eos_token \}\}"):
        encode(with_template(folder, endless), Chat(turns("Who?", "Me.")))


def test_a_template_that_raises_names_the_turn_and_the_reason(folder):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"the chat template failed: .*user first"):
        encode(with_template(folder, strict), Chat([{"role": "system", "content": "x"}, *turns("a", "b")]))


def test_a_conversation_that_begins_with_the_assistant_is_refused(tokenizer):
    with pytest.raises(UserError, match="turn 1: the conversation begins with an assistant turn"):
        encode(tokenizer, Chat(turns("Hi", "Hello", first="assistant")))


def test_templates_with_generation_blocks_are_read_like_any_other(folder):
    marked = CHATML.replace(
        "message['content'] + '<|im_end|>\n' }}",
        "'' }}{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
    )
    assert "generation %}" in marked
    chat = Chat(turns("Who?", "A model."))
    assert trained(with_template(folder, marked), chat) == ["A model.<|im_end|>"]


def test_a_tokenizer_without_a_template_is_refused_with_the_fix(tmp_path):
    bare = load_tokenizer(TokenizerSpec(str(tiny_tokenizer(tmp_path, template=None))))
    with pytest.raises(UserError, match=r"no chat template.*data\.chat_template.*chatml\.jinja"):
        template_of(bare)


def test_the_shipped_chatml_template_is_proven_too(folder):
    from launcher.shipped import folder as shipped

    template = (shipped("recipes") / "chat_templates" / "chatml.jinja").read_text()
    chat = Chat(turns("Who?", "A model.", "Sure?", "Yes."))
    tokenizer = with_template(folder, template)
    assert trained(tokenizer, chat) == ["A model.<|im_end|>", "Yes.<|im_end|>"]
    assert (
        render(chat, template_of(tokenizer), MaskRule("all")).text
        == render(chat, template_of(with_template(folder, CHATML)), MaskRule("all")).text
    )


def test_a_completion_is_trained_with_the_end_token_and_its_prompt_is_not(tokenizer):
    ids, weights = encode(tokenizer, Completion("What is it? ", "It is 42."))
    prompt = tokenizer.encode("What is it? ")
    assert ids[: len(prompt)].tolist() == prompt
    assert weights.tolist() == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[len(prompt) : -1].tolist()) == "It is 42."
    assert encode(tokenizer, Completion("a", "b"), train_on="all")[1].all()


def test_text_ends_with_the_end_token_and_is_trained_whole(tokenizer):
    ids, weights = encode(tokenizer, Text("Once upon a time"))
    assert ids.tolist() == [*tokenizer.encode("Once upon a time"), tokenizer.eos_token_id]
    assert weights.all()
    assert encode(tokenizer, Text(""))[0].size == 0


def test_a_bare_tokenizer_json_is_enough_and_its_end_token_is_found(folder, tmp_path):
    (tmp_path / "t.json").write_bytes((folder / "tokenizer.json").read_bytes())
    bare = load_tokenizer(TokenizerSpec(str(tmp_path / "t.json"), template=CHATML))
    assert bare.eos_token == "<|endoftext|>"
    assert trained(bare, Chat(turns("Who?", "Me."))) == ["Me.<|im_end|>"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(TokenizerSpec(str(tmp_path / "folder"))).eos_token == "<|endoftext|>"
