"""`launcher prepare` and `launcher preview`, as a user and as a program call them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from launcher.cli import preview as preview_verb
from launcher.cli.data import stats
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
    assert values["version"] == 2
    assert values["train"]["documents"] + values["eval"]["documents"] == 20
    assert values["total_steps"] == -(-values["total_rows"] // 2)
    assert values["tokenizer"]["eos_token_id"] is not None


def test_strict_prepare_refuses_a_record_that_would_be_cut(recipe):
    arguments = [recipe, "--strict", "data.seq_len=20", "data.overlong=truncate"]
    with pytest.raises(UserError, match="strict: records would be dropped"):
        CliRunner().invoke(prepare, arguments, catch_exceptions=False)


def test_preview_json_shows_rows_documents_tokens_and_counts(recipe):
    shown = json.loads(call(preview_verb.command, recipe, "-n", "2", "--json").stdout)
    assert len(shown["rows"]) == 2
    document = shown["rows"][0]["documents"][0]
    assert set(document) == {"source", "record", "side", "tokens"}
    assert set(document["tokens"][0]) == {"id", "text", "trained", "weight", "special"}
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


def test_preview_of_a_step_shows_its_global_batch_of_a_recipe_and_of_a_run(recipe, tmp_path):
    from launcher.data.mix import Mix
    from launcher.data.prepare import prepare as build
    from launcher.recipe.check import load
    from launcher.recipe.schema import to_dict
    from launcher.run.directory import RunDirectory

    loaded = load(recipe).recipe
    prepared = build(loaded)
    run = RunDirectory(tmp_path / "runs" / "one")
    run.create(to_dict(loaded), {}, {})
    run.data_file.write_text(json.dumps(prepared.to_dict()))
    batch = loaded.train.global_batch_size
    rows = Mix.open(prepared.train).global_batch(1, seed=loaded.train.seed, global_batch_size=batch)
    for of in (recipe, str(run.path)):
        shown = json.loads(call(preview_verb.command, of, "--step", "2", "--json").stdout)["rows"]
        assert [row["row"] for row in shown] == rows.tolist()
        assert all(document["tokens"] for row in shown for document in row["documents"])
    with pytest.raises(UserError, match="--step 99999: expected 1 to"):
        CliRunner().invoke(preview_verb.command, [str(run.path), "--step", "99999"], catch_exceptions=False)
    with pytest.raises(UserError, match="the rows of a run are fixed"):
        CliRunner().invoke(preview_verb.command, [str(run.path), "data.seq_len=8"], catch_exceptions=False)


def test_preview_html_writes_a_page_and_prints_the_counts(recipe, tmp_path):
    result = call(preview_verb.command, recipe, "-n", "2", "--html", "rows.html")
    page = (tmp_path / "rows.html").read_text()
    assert page.count('class="card"') == 3  # the counts and two rows
    assert "page  rows.html" in result.stdout
    assert "rows of 20 documents" in result.stdout
    with pytest.raises(UserError, match=r"--html no/rows\.html: cannot be written: No such file"):
        call(preview_verb.command, recipe, "--html", "no/rows.html")
    with pytest.raises(UserError, match="give one of the two"):
        call(preview_verb.command, recipe, "--html", "rows.html", "--json")


def test_data_stats_counts_and_draws(recipe, tmp_path):
    text = call(stats, recipe, "-o", "pictures").stdout
    assert "train" in text
    assert "lengths  mean " in text
    assert (tmp_path / "pictures" / "r-lengths.png").exists()
    found = json.loads(call(stats, recipe, "--json", "data.eval_fraction=0.2").stdout)
    assert found["version"] == 1
    (source,) = found["train"]["sources"]
    assert source["documents"] + found["eval"]["documents"] == 20
    assert sum(found["train"]["histogram"]["documents"]) == found["train"]["documents"]
    with pytest.raises(UserError, match=r"-o r\.yaml/x: cannot be written: Not a directory"):
        call(stats, recipe, "-o", "r.yaml/x")


def test_data_stats_of_a_stream_are_refused(recipe):
    with pytest.raises(UserError, match=r"data\.streaming = true"):
        call(stats, recipe, "data.streaming=true", "train.epochs=null", "train.max_steps=5")


# what a base install cannot import: hidden from every finder, as if it were not there
WITHOUT = """
import sys
class Without:
    def __init__(self, finders): self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("xxhash", "torch", "datasets", "transformers", "numpy", "numba"):
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)
sys.meta_path = [Without(list(sys.meta_path))]
from launcher.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("verb", ["prepare", "preview", "data stats"])
def test_without_the_train_extra_the_verb_says_how_to_install_it(recipe, verb):
    command = [sys.executable, "-c", WITHOUT, *verb.split(), recipe]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert 'pip install "train-launcher[train]"' in ended.stderr
    assert "Traceback" not in ended.stderr
    wrong = subprocess.run([*command, "train.sed=1"], capture_output=True, text=True, check=False)
    assert "Did you mean train.seed?" in wrong.stderr


@pytest.mark.parametrize("verb", ["prepare", "preview"])
def test_broken_data_end_a_verb_with_one_line_and_code_2(recipe, verb, tmp_path):
    with open(tmp_path / "train.jsonl", "a") as f:
        f.write('{"instruction": \n')
    ended = subprocess.run(
        [sys.executable, "-m", "launcher", verb, recipe], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    *progress, said = ended.stderr.splitlines()
    assert progress[0] == "reading train.jsonl"
    assert "train.jsonl: record 20 (row 21), line 21: not JSON" in said


def test_a_small_prepare_imports_neither_torch_nor_a_compiler(recipe):
    code = "import sys; from launcher.cli.prepare import command; command.main(sys.argv[1:], standalone_mode=False); "
    code += "print({'torch', 'numba'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"
