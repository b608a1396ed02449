"""For random conversations and every shipped template: what is trained is what the assistant says and what ends it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data import shapes
from launcher.data.chat import MaskRule
from launcher.data.encoder import Encoder
from launcher.data.formats import Chat
from launcher.data.proof import Conversation, prove
from launcher.data.template import Template, special_tokens
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.errors import UserError
from launcher.shipped import chat_template, chat_templates
from tests.data import styles
from tests.data.make import tiny_tokenizer


@dataclass(frozen=True)
class Form:
    """How a template writes an answer: lead, words, stop.

    last: lead of the last turn, where it is another
    trims: whether white space around the words is taken away
    """

    stop: str
    lead: str = ""
    last: str | None = None
    trims: bool = False


EOS = "<|im_end|>"  # of the tests' tokenizer
FORMS = {
    "alpaca": Form(EOS, trims=True),
    "chatml": Form("<|im_end|>"),
    "command-r": Form("<|END_OF_TURN_TOKEN|>", trims=True),
    "deepseek": Form("<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "gemma": Form("<end_of_turn>", trims=True),
    "granite": Form("<|end_of_text|>"),
    "llama2": Form(" </s>", lead=" ", trims=True),
    "llama3": Form("<|eot_id|>", trims=True),
    "mistral": Form("</s>", lead=" "),
    "olmo": Form("<|endoftext|>"),
    "phi3": Form("<|end|>"),
    "phi4": Form("<|im_end|>"),
    "qwen": Form("<|im_end|>"),
    "qwen3": Form("<|im_end|>", last="<think>\n\n</think>\n\n"),
    "tulu": Form(EOS),
    "vicuna": Form(EOS, lead=" ", trims=True),
    "zephyr": Form(EOS),
}
SPECIAL = sorted(
    {t for name in FORMS for t in special_tokens(chat_template(name).read_text("utf-8")) if t != "eos_token"}
    - {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
)

# words as templates and tokenizers write them, special tokens among them
traps = st.sampled_from([
    "<|im_end|>", "</s>", "<start_of_turn>model\n", "[/INST]", "### Response:\n", "ASSISTANT:", "<|assistant|>\n",
    "<think>", "</think>\n\n", "{{ messages }}", "{% generation %}", "\n\n", "  ", "assistant\n", "<tool_call>",
])  # fmt: skip
pieces = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12) | st.text(" \n\taé", max_size=4)
words = st.lists(pieces | pieces | traps, min_size=1, max_size=3).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw):
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [{"role": role, "content": draw(words)} for role in roles]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=None, special=SPECIAL, vocab_size=450)


@pytest.fixture(scope="module")
def encoders(folder):
    made = {}
    for name in FORMS:
        spec = TokenizerSpec(str(folder), template=chat_template(name).read_text("utf-8"))
        tokenizer = load_tokenizer(spec)
        made[name] = (tokenizer, Encoder(tokenizer, rule=MaskRule(), objective="sft"))
    return made


def expected(form, messages):
    answers = [m["content"].strip() if form.trims else m["content"] for m in messages if m["role"] == "assistant"]
    leads = [form.lead] * (len(answers) - 1) + [form.lead if form.last is None else form.last]
    return [f"{lead}{answer}{form.stop}" for lead, answer in zip(leads, answers, strict=True)]


def runs(tokenizer, ids, weights):
    """Text of each run of trained tokens."""
    found: list[list[int]] = [[]]
    for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if weight:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in found if run]


def check(name, encoders, messages):
    tokenizer, encoder = encoders[name]
    (group,) = encoder.encode([("f: record 0", Chat(messages))])
    if any(token in m["content"] for m in messages for token in tokenizer.get_added_vocab()):
        assert group.dropped.startswith("the special token ")
        return
    ((ids, weights, _),) = group.documents
    assert group.dropped == ""
    assert runs(tokenizer, ids, weights) == expected(FORMS[name], messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text


STYLES = {name: text for name, text in vars(styles).items() if name.isupper()}
PROGRAMS = {
    name: Template(text, {"bos_token": "<s>", "eos_token": "</s>"})
    for name, text in {**STYLES, **{name: chat_template(name).read_text("utf-8") for name in FORMS}}.items()
}
RULES = [MaskRule(), MaskRule(end_of_turn=False), MaskRule("last_assistant"), MaskRule(roles=("assistant", "user"))]


def same_as_proven_alone(name, messages, rule):
    """By the shape that the template remembers as by the proof of this very conversation, where that can be proven."""
    found = []
    for find in (shapes.locate, prove):
        try:
            conversation = Conversation(messages, None, PROGRAMS[name])
            located = find(conversation, sorted(rule.weights(messages)), bodies=not rule.end_of_turn)
            found.append((located.text, located.places, located.notes))
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1] or "do not make exactly one stretch" in found[1]


def test_every_shipped_template_is_tested():
    assert sorted(FORMS) == chat_templates()


@pytest.mark.parametrize("name", FORMS)
def test_exactly_the_answers_and_what_ends_them_are_trained(name, encoders):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def holds(messages):
        check(name, encoders, messages)

    holds()


@pytest.mark.matrix
@pytest.mark.parametrize("name", FORMS)
def test_exactly_the_answers_and_what_ends_them_are_trained_in_many_conversations(name, encoders):
    @settings(max_examples=800, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def holds(messages):
        check(name, encoders, messages)

    holds()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(PROGRAMS)), conversations(), st.sampled_from(RULES))
def test_a_shape_finds_what_the_proof_of_the_record_finds(name, messages, rule):
    same_as_proven_alone(name, messages, rule)


@pytest.mark.matrix
@settings(max_examples=8000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(PROGRAMS)), conversations(), st.sampled_from(RULES))
def test_a_shape_finds_what_the_proof_of_the_record_finds_in_many_conversations(name, messages, rule):
    same_as_proven_alone(name, messages, rule)
