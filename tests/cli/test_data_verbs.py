"""`launcher prepare` and `launcher preview`, as a user and as a program call them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from launcher.cli import preview as preview_verb
from launcher.cli.prepare import command as prepare
from launcher.errors import UserError
from tests.data.make import tiny_tokenizer, write_jsonl


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer(tmp_path / "tokenizer")
    records = [{"instruction": f"Who is {i}?", "output": f"It is {i}."} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", records)
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    config = f"{{model_type: llama, vocab_size: 400, {sizes}}}"
    (tmp_path / "r.yaml").write_text(
        f"model: {{config: {config}, tokenizer: tokenizer}}\n"
        "data: {train: [{path: train.jsonl}], seq_len: 96, cache_dir: cache}\n"
        "train: {global_batch_size: 2, epochs: 1}\n"
    )
    return "r.yaml"


def call(command, *arguments):
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_prepare_says_what_it_recognised_made_and_counted(recipe):
    result = call(prepare, recipe)
    assert "train.jsonl: recognised as alpaca" in result.stdout
    assert "rows of 20 documents" in result.stdout
    assert "packing efficiency" in result.stdout
    assert "packing train rows" in result.stderr
    assert "packing" not in call(prepare, recipe).stderr


def test_prepare_json_is_what_data_json_holds(recipe):
    values = json.loads(call(prepare, recipe, "--json", "data.eval_fraction=0.2").stdout)
    assert values["version"] == 1
    assert values["train"]["documents"] + values["eval"]["documents"] == 20
    assert values["total_steps"] == -(-values["total_rows"] // 2)
    assert values["tokenizer"]["eos_token_id"] is not None


def test_strict_prepare_refuses_a_record_that_would_be_cut(recipe):
    arguments = [recipe, "--strict", "data.seq_len=20", "data.overlong=truncate"]
    with pytest.raises(UserError, match="strict: records would be dropped or cut"):
        CliRunner().invoke(prepare, arguments, catch_exceptions=False)


def test_preview_json_shows_rows_documents_tokens_and_counts(recipe):
    shown = json.loads(call(preview_verb.command, recipe, "-n", "2", "--json").stdout)
    assert len(shown["rows"]) == 2
    document = shown["rows"][0]["documents"][0]
    assert set(document) == {"source", "record", "tokens"}
    assert set(document["tokens"][0]) == {"id", "text", "trained", "weight"}
    assert "".join(t["text"] for t in document["tokens"] if t["trained"]) == f"It is {document['record']}.<|im_end|>"
    assert shown["stats"]["documents"] == 20
    assert 0 < shown["stats"]["packing_efficiency"] <= 1


def test_preview_off_a_terminal_marks_trained_tokens_without_colour_codes(recipe):
    text = call(preview_verb.command, recipe, "-n", "1").stdout
    assert "\x1b" not in text
    assert text.count("[[") == text.count("]]") == text.count("--- ") > 0
    assert "[[I" in text


def test_preview_on_a_terminal_colours_trained_tokens(recipe):
    from launcher.data.prepare import prepare as build
    from launcher.data.preview import lines, preview
    from launcher.recipe.check import load

    loaded = load(recipe).recipe
    text = "\n".join(lines(preview(loaded, build(loaded), rows=1), colour=True))
    assert "\x1b[32mI" in text
    assert "[[" not in text
