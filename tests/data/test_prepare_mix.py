"""`prepare` with several sources and evaluation sets: their entries in data.json, leaks, losses, what a run refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from launcher.data.mix import Mix
from launcher.data.prepare import prepare, write_data_json
from launcher.errors import UserError
from launcher.jobs.preparation import is_prepared, prepare_run, total_steps
from launcher.recipe.schema import from_dict, to_dict
from launcher.run.data import remarks
from launcher.run.directory import RunDirectory
from tests.data.make import tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """recipe({name: (records, more keys of the source)}, key=value of data)"""

    def recipe(train, *, held=None, steps=None, **data):
        def sources(named):
            return [
                {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", records)), **more}
                for name, (records, more) in named.items()
            ]

        return from_dict(
            {
                "model": {"config": {"model_type": "llama", "vocab_size": 400}, "tokenizer": str(tokenizer)},
                "data": {
                    "train": sources(train), "seq_len": 64, "num_workers": 1, "cache_dir": str(tmp_path / "cache"),
                    **({"eval": sources(held)} if held else {}), **data,
                },
                "train": {"global_batch_size": 4, **(steps or {"epochs": 1})},
            }
        )  # fmt: skip

    return recipe


def said(word, count):
    return [{"prompt": f"{word} {i}? ", "completion": f"The {word} is {i}."} for i in range(count)]


def test_each_source_has_its_own_store_and_its_share_of_the_epoch(make):
    recipe = make({"cats": (said("cat", 40), {}), "dogs": (said("dog", 10), {"name": "hounds"})})
    prepared = prepare(recipe)
    cats, hounds = prepared.train["sources"]
    assert (cats["name"], hounds["name"]) == ("cats", "hounds")
    assert cats["store"] != hounds["store"]
    assert (cats["documents"], hounds["documents"], prepared.train["documents"]) == (40, 10, 50)
    assert cats["epoch_rows"] == cats["rows"]
    assert cats["format"] == "prompt_completion"
    assert cats["share"] == pytest.approx(cats["tokens"] / prepared.train["tokens"])
    rows = cats["rows"] + hounds["rows"]
    assert (prepared.train["rows"], prepared.train["epoch_rows"], prepared.total_rows) == (rows, rows, rows)
    assert prepared.train["groups"] == {"plain": 50, "pairs": 0, "labelled": 0}


def test_weights_are_shares_of_the_tokens_and_leave_the_stores_as_they_are(make):
    plain = prepare(make({"a": (said("cat", 40), {}), "b": (said("dog", 40), {})}))
    recipe = make({"a": (said("cat", 40), {"weight": 1}), "b": (said("dog", 40), {"weight": 3})}, steps={"epochs": 2})
    weighted = prepare(recipe)
    assert not weighted.built
    assert [s["share"] for s in weighted.train["sources"]] == [0.25, 0.75]
    assert weighted.train["epoch_rows"] == sum(s["epoch_rows"] for s in weighted.train["sources"])
    assert weighted.total_rows == 2 * weighted.train["epoch_rows"]
    assert weighted.steps_per_epoch == weighted.train["epoch_rows"] / 4
    assert weighted.train["fingerprint"] != plain.train["fingerprint"]
    mix = Mix.open(weighted.train)
    rows = mix.global_batch(0, seed=0, global_batch_size=mix.rows)
    first, second = mix.tokens_of_sources(rows)
    assert second / (first + second) == pytest.approx(0.75, abs=64 / (first + second))


def test_evaluation_sets_have_names_and_stores_and_leaks_are_counted_and_said(make):
    train = {"a": (said("cat", 20), {})}
    held = {
        "fresh": (said("bird", 4), {}),
        "old": (said("cat", 3), {"name": "known"}),
        "more": (said("fish", 2), {"name": "known"}),
    }
    prepared = prepare(make(train, held=held))
    fresh, known = prepared.eval["sets"]
    assert (fresh["name"], fresh["documents"], known["name"], known["documents"]) == ("fresh", 4, "known", 5)
    assert prepared.eval["documents"] == 9
    assert prepared.leaked == {"fresh": 0, "known": 3}
    (leak,) = [line for line in remarks(prepared.to_dict()) if "training data" in line]
    assert leak.startswith("eval known: warning: 3 of 5 records are in the training data, too")


def test_an_evaluation_set_beside_it_leaves_the_training_data_as_they_are(make):
    train = {"a": (said("cat", 20), {})}
    before = prepare(make(train))
    with_eval = prepare(make(train, held={"b": (said("dog", 3), {})}))
    assert with_eval.train == before.train


def test_duplicates_are_counted_over_all_sources(make):
    prepared = prepare(make({"a": (said("cat", 5) + said("cat", 2), {}), "b": (said("cat", 3), {})}))
    assert prepared.train["duplicates"] == 5
    assert "train: 5 of 10 records have the text of an earlier one" in list(remarks(prepared.to_dict()))


def test_each_source_holds_out_a_set_of_its_own_and_copies_stay_on_one_side(make):
    sources = {"a": (said("cat", 60) * 2, {}), "b": (said("dog", 40) + said("cat", 60), {})}
    prepared = prepare(make(sources, eval_fraction=0.2))
    assert [entry["name"] for entry in prepared.eval["sets"]] == ["a", "b"]
    whole = [
        t["documents"] + e["documents"] for t, e in zip(prepared.train["sources"], prepared.eval["sets"], strict=True)
    ]
    assert whole == [120, 100]
    assert prepared.leaked == {"a": 0, "b": 0}


def test_what_is_lost_is_told_by_source_and_strict_names_the_first_record(make):
    long = {"prompt": "Tell: ", "completion": "story " * 200}
    sources = {"a": ([*said("cat", 3), long], {}), "b": ([*said("dog", 1), long, long], {})}
    recipe = make(sources, overlong="truncate")
    lines = list(remarks(prepare(recipe).to_dict()))
    assert lines[:2] == ["train a: changed: 1 (truncated to seq_len)", "train b: changed: 2 (truncated to seq_len)"]
    with pytest.raises(
        UserError, match=r"strict: .*\n.*1, the first is .*a.jsonl: record 3 \(row 4\)\n.*b.jsonl: record 1"
    ):
        prepare(recipe, strict=True)


def run_of(tmp_path, recipe):
    run = RunDirectory(tmp_path / "run")
    run.create(to_dict(recipe), {}, {})
    return run


def test_a_run_refuses_pairs_under_sft_in_words_and_writes_nothing(make, tmp_path):
    pairs = [{"prompt": "Hi? ", "chosen": "Yes.", "rejected": "No."}] * 3
    recipe = make({"good": (said("cat", 3), {}), "pairs": (pairs, {})})
    assert prepare(recipe).train["groups"] == {"plain": 3, "pairs": 3, "labelled": 0}
    run = run_of(tmp_path, recipe)
    with pytest.raises(
        UserError, match=r"data.train: pairs holds 3 pairs .*read as preference.*objective.kind = sft would"
    ):
        prepare_run(str(run.path), lambda *_: None)
    assert not run.data_file.exists()


def test_a_run_that_began_under_another_version_says_what_to_do(make, tmp_path):
    recipe = make({"a": (said("cat", 9), {})})
    run = run_of(tmp_path, recipe)
    prepare_run(str(run.path), lambda *_: None)
    assert is_prepared(run, recipe)
    data = json.loads(run.data_file.read_text())
    rows = data["train"]["rows"]
    old = {**data, "version": 1, "train": {"store": "/gone", "rows": rows, "fingerprint": "x"}, "eval": None}
    run.data_file.write_text(json.dumps(old))
    assert not is_prepared(run, recipe)
    assert total_steps(run, recipe) == data["total_steps"]
    with pytest.raises(UserError, match=r"data.json: version 1, expected 2: .*launcher_version in run.json.*--force"):
        prepare_run(str(run.path), lambda *_: None)
    write_data_json(SimpleNamespace(data_file=run.data_file), prepare(recipe), force=True)
    assert is_prepared(run, recipe)
