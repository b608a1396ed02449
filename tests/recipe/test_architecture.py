"""Architectures that cannot be built: said by `check`, each by its own key and with what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import Problem, RecipeError
from tests.recipe.make import GOOD, loaded

LLAMA = (
    "model={tokenizer: a/b, config: {model_type: llama, hidden_size: 192, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 6, num_key_value_heads: 2, vocab_size: 97}}"
)
GPT2 = "model={tokenizer: a/b, config: {model_type: gpt2, n_embd: 48, n_head: 4, vocab_size: 97}}"
MIXTRAL = "model={tokenizer: a/b, config: {model_type: mixtral, num_local_experts: 4}}"
MAMBA = "model={tokenizer: a/b, config: {model_type: mamba}}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(folder: Path, *overrides: str) -> list[Problem]:
    try:
        loaded(folder, *overrides, text=GOOD.replace("{name: org/model}", "{}"))
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (LLAMA, "hidden_size=193", "expected a multiple of num_attention_heads = 6. Nearest: 192."),
        (LLAMA, "num_key_value_heads=5", "expected a divisor of num_attention_heads = 6. Nearest: 3."),
        (LLAMA, "num_attention_heads=0", "expected a whole number above 0. Write e.g. 32."),
        (LLAMA, "hidden_size=abc", "expected a whole number above 0. Write e.g. 4096."),
        (LLAMA, "vocab_size=-5", "expected a whole number above 0. Write e.g. 32000."),
        (LLAMA, "num_hidden_layers=2.5", "expected a whole number above 0. Write e.g. 32."),
        (LLAMA, "vocab_size=null", "expected a whole number above 0. Write e.g. 32000."),
        (LLAMA, "hidden_sizes=3", "expected a key that llama knows. Did you mean 'hidden_size'?"),
        (
            LLAMA,
            "model_type=null",
            "expected the name of a causal language model, as in config.json. Write e.g. llama.",
        ),
        (GPT2, "n_embd=49", "expected a multiple of n_head = 4. Nearest: 48."),
        (MIXTRAL, "num_experts_per_tok=5", "expected at most the 4 experts of a block. Write 2."),
        (MAMBA, "hidden_size=0", "expected a whole number above 0."),
    ],
)
def test_a_size_that_cannot_be_is_named_with_what_to_write(here: Path, model: str, change: str, said: str) -> None:
    assert problems(here, model) == []
    key, _, value = f"model.config.{change}".partition("=")
    (problem,) = problems(here, model, f"{key}={value}")
    assert problem.key == key
    assert str(problem).endswith(f"{key} = {value}: {said}")


@pytest.mark.parametrize(
    "changes",
    [
        ["head_dim=40", "hidden_size=193"],  # heads need not share out the hidden size
        ["head_dim=null", "num_key_value_heads=null"],
        ["moe_intermediate_size=7"],  # another key, not a misspelt one
        ["model_type=qwen9"],  # a kind that no formula knows may exist
    ],
)
def test_what_may_be_is_let_through(here: Path, changes: list[str]) -> None:
    assert problems(here, LLAMA, *(f"model.config.{change}" for change in changes)) == []


def test_wrong_sizes_in_a_models_folder_are_a_problem_of_its_name(here: Path) -> None:
    (here / "folder").mkdir()
    config = {"model_type": "llama", "hidden_size": 193, "num_attention_heads": 6, "num_key_value_heads": 2}
    (here / "folder" / "config.json").write_text(json.dumps(config))
    (problem,) = problems(here, "model={name: ./folder, tokenizer: a/b}")
    assert problem.key == "model.name"
    assert problem.expected == (
        "a config.json whose hidden_size is a multiple of num_attention_heads = 6, it says 193"
    )  # fmt: skip


def test_an_adapter_wider_than_the_smallest_layer_it_is_put_beside_is_refused(here: Path) -> None:
    lora = [LLAMA, "adapter.kind=lora"]
    assert problems(here, *lora, "adapter.rank=64") == []  # k_proj gives 2 heads of 32
    (problem,) = problems(here, *lora, "adapter.rank=65")
    assert problem.key == "adapter.rank"
    assert problem.expected.startswith("at most 64, the smaller dimension of the smallest layer")
    assert problems(here, *lora, "adapter.rank=192", "adapter.targets=[q_proj]") == []
    assert [p.key for p in problems(here, *lora, "adapter.rank=193", "adapter.targets=[q_proj]")] == ["adapter.rank"]
