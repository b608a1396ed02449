"""`prepare` builds each store once, finds it again at once, and says what it left out."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.data import parts
from launcher.data.prepare import prepare, write_data_json
from launcher.data.store import Store
from launcher.data.tokenizer import TokenizerSpec, load_tokenizer
from launcher.errors import UserError
from launcher.recipe.schema import from_dict
from tests.data.make import tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """recipe(records or path, key=value of data, train={...}, model={...}) with a cache of its own."""

    def recipe(train, *, source=None, objective=None, steps=None, vocab_size=400, **data):
        path = train if isinstance(train, str | Path) else write_jsonl(tmp_path / "train.jsonl", train)
        return from_dict(
            {
                "model": {"config": {"model_type": "llama", "vocab_size": vocab_size}, "tokenizer": str(tokenizer)},
                "objective": {"kind": objective or "sft"},
                "data": {
                    "train": [{"path": str(path), **(source or {})}], "seq_len": 64, "num_workers": 1,
                    "cache_dir": str(tmp_path / "cache"), **data,
                },
                "train": {"global_batch_size": 4, **(steps or {"epochs": 1})},
            }
        )  # fmt: skip

    return recipe


def pairs(count):
    return [{"prompt": f"Question {i}? ", "completion": f"The answer is {i}."} for i in range(count)]


def contents(prepared, tokenizer_folder, role="train"):
    """Every document of the stores: (record, decoded text), as often as rows hold it."""
    from launcher.data.tokenizer import TokenizerSpec, load_tokenizer

    words = load_tokenizer(TokenizerSpec(str(tokenizer_folder)))
    stores = [store_of(prepared, role, i) for i in range(len(entries(prepared, role)))]
    documents = [d for store in stores for row in range(store.rows) for d in store.documents(row)]
    return sorted((d.record, words.decode(d.tokens.tolist())) for d in documents)


def entries(prepared, role="train"):
    return prepared.train["sources"] if role == "train" else prepared.eval["sets"]


def store_of(prepared, role="train", number=0):
    return Store.open(entries(prepared, role)[number]["store"])


def test_every_record_is_in_one_row_with_its_number(make, tokenizer):
    prepared = prepare(make(pairs(30)))
    expected = [(i, f"Question {i}? The answer is {i}.<|im_end|>") for i in range(30)]
    assert contents(prepared, tokenizer) == expected
    entry = prepared.train
    assert entry["documents"] == 30
    assert entry["dropped"] == {}
    assert prepared.steps_per_epoch == entry["rows"] / 4
    assert (prepared.total_rows, prepared.total_steps) == (entry["rows"], -(-entry["rows"] // 4))


def test_a_store_is_built_once_and_found_again_until_something_that_matters_changes(make, tmp_path):
    recipe = make(pairs(10))
    first = prepare(recipe)
    assert first.built
    again = prepare(recipe)
    assert not again.built
    assert again == first
    write_jsonl(tmp_path / "train.jsonl", [*pairs(9), {"prompt": "Question 9? ", "completion": "The answer is X."}])
    changed = prepare(recipe)
    assert changed.built
    assert changed.train["fingerprint"] != first.train["fingerprint"]
    write_jsonl(tmp_path / "train.jsonl", pairs(10))
    assert prepare(recipe) == first


def test_another_row_length_reuses_the_tokens(make):
    prepare(make(pairs(10)))
    said = []
    wider = prepare(make(pairs(10), seq_len=128), progress=lambda what, done, total: said.append(what))
    assert wider.built
    assert said == ["packing train rows", "looking for duplicates"]


def test_rows_do_not_depend_on_the_number_of_workers(make, monkeypatch):
    monkeypatch.setattr(parts, "SHARD_BYTES", 500)
    one = prepare(make(pairs(40)))
    two = prepare(make(pairs(40), num_workers=2, cache_dir=str(store_of(one).path.parents[2] / "other")))
    first, second = store_of(one), store_of(two)
    assert len(first.manifest["parts"]) > 2
    for name, array in first._arrays.items():
        assert array.tolist() == second._arrays[name].tolist(), name


def test_finding_a_store_imports_nothing_heavy(make, tmp_path):
    from launcher.recipe.schema import to_dict

    recipe = make(pairs(10))
    prepare(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    code = (
        "import json, sys; from launcher.recipe.schema import from_dict; from launcher.data.prepare import prepare;"
        f"p = prepare(from_dict(json.load(open({str(tmp_path / 'recipe.json')!r})))); "
        "assert not p.built; print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(result.stdout.split()) & {"torch", "transformers", "datasets", "pandas", "pyarrow", "numba"}


def long(words=200):
    return {"prompt": "Tell: ", "completion": "story " * words}


def test_a_long_record_is_an_error_that_names_it(make):
    with pytest.raises(
        UserError, match=r"seq_len = 64: 1 records are longer.*\n.*train.jsonl: record 2 \(row 3\): \d+ tok"
    ):
        prepare(make([*pairs(2), long()]))


def test_a_long_record_is_dropped_and_counted(make):
    prepared = prepare(make([*pairs(2), long()], overlong="drop"))
    assert prepared.train["dropped"] == {"longer than seq_len": 1}
    assert prepared.train["documents"] == 2


def test_a_long_record_is_truncated_and_counted_and_dropped_when_nothing_trained_is_left(make):
    behind = {"prompt": "story " * 200, "completion": "end"}
    prepared = prepare(make([*pairs(2), long(), behind], overlong="truncate"))
    assert prepared.train["changed"] == {"truncated to seq_len": 1}
    assert prepared.train["dropped"] == {"no trained token left when truncated to seq_len": 1}
    store = store_of(prepared)
    assert max(len(d.tokens) for r in range(store.rows) for d in store.documents(r)) == 64


def test_splitting_keeps_every_token_of_a_long_record(make, tokenizer):
    prepared = prepare(make([{"text": "story " * 300}], overlong="split", objective="pretrain"))
    store = store_of(prepared)
    pieces = sorted((store.document(d) for d in range(prepared.train["documents"])), key=lambda d: -len(d.tokens))
    assert all(len(piece.tokens) == 64 for piece in pieces[:-1])
    assert "".join(text for _, text in contents(prepared, tokenizer)).count("story") == 300
    assert prepared.train["changed"] == {"split at seq_len": 1}


def test_records_that_teach_nothing_are_dropped_and_counted_and_an_error_when_strict(make):
    records = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
    ]
    recipe = make(records)
    assert prepare(recipe).train["dropped"] == {"no trained token": 1}
    with pytest.raises(UserError, match=r"strict: .*\n.*no trained token: 1, the first is .*record 0 \(row 1\)"):
        prepare(recipe, strict=True)


def test_held_out_records_are_apart_and_stay_so_when_records_are_added(make, tokenizer):
    def split(count):
        prepared = prepare(make(pairs(count), eval_fraction=0.25))
        train, held = contents(prepared, tokenizer), contents(prepared, tokenizer, "eval")
        assert len(train) + len(held) == count
        assert not set(train) & set(held)
        return {record for record, _ in held}

    few, many = split(40), split(80)
    assert 0 < len(few) < 40
    assert few == {record for record in many if record < 40}


def test_held_out_records_stay_when_a_file_is_added_before_theirs(make, tokenizer, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", pairs(40))
    before = contents(prepare(make(folder, eval_fraction=0.25)), tokenizer, "eval")
    write_jsonl(folder / "a.jsonl", [{"prompt": "Other: ", "completion": f"{i}."} for i in range(40)])
    after = contents(prepare(make(folder, eval_fraction=0.25)), tokenizer, "eval")
    assert before == [document for document in after if "Question" in document[1]] != after


def test_a_tiny_set_still_holds_out_one_record(make):
    assert prepare(make(pairs(3), eval_fraction=0.01)).eval["documents"] == 1


def test_separate_evaluation_sources_make_a_store_of_their_own(make, tmp_path):
    path = write_jsonl(tmp_path / "eval.jsonl", pairs(5))
    prepared = prepare(make(pairs(20), eval=[{"path": str(path)}]))
    assert (prepared.train["documents"], prepared.eval["documents"]) == (20, 5)


def test_max_samples_takes_the_first_records_over_all_files(make, tokenizer, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name in "ab":
        write_jsonl(folder / f"{name}.jsonl", pairs(4))
    prepared = prepare(make(folder, source={"max_samples": 5}))
    assert [record for record, _ in contents(prepared, tokenizer)] == [0, 0, 1, 2, 3]


def test_packing_none_lays_one_document_a_row(make):
    entry = prepare(make(pairs(9), packing="none")).train
    assert entry["rows"] == entry["documents"] == 9


def test_steps_follow_from_epochs_or_are_given(make):
    recipe = make(pairs(40), steps={"epochs": 2.5})
    prepared = prepare(recipe)
    assert prepared.total_rows == round(2.5 * prepared.train["rows"])
    assert prepared.total_steps == -(-prepared.total_rows // 4)
    fixed = prepare(make(pairs(40), steps={"max_steps": 7}))
    assert (fixed.total_rows, fixed.total_steps) == (None, 7)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no records"),
        ([{"prompt": "", "completion": ""}], r"nothing is left to learn from \(no trained token: 1\)"),
        ([*pairs(3), {"prompt": "x"}], r"train.jsonl: record 3 \(row 4\): column completion is (null|missing)"),
        ([*pairs(3), {"prompt": "x", "completion": None}], r"record 3 \(row 4\): column completion is (null|missing)"),
        ([{"messages": [{"role": "alien", "content": "a"}]}], r"record 0 \(row 1\): turn 1: unknown role 'alien'"),
    ],
)
def test_bad_data_is_a_message_with_file_and_record(make, records, message):
    with pytest.raises(UserError, match=message):
        prepare(make(records))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(make):
    with pytest.raises(UserError, match=r"the data needs token ids up to .* vocab_size is 256"):
        prepare(make(pairs(3), vocab_size=256))
    prepare(make(pairs(3)))
    with pytest.raises(UserError, match="vocab_size is 256"):
        prepare(make(pairs(3), vocab_size=256))


def test_a_config_without_vocab_size_has_that_of_its_family(make):
    recipe = make(pairs(3))
    del recipe.model.config["vocab_size"]
    prepare(recipe)  # llama's 32,000
    recipe.model.config = {"model_type": "wav2vec2"}
    with pytest.raises(UserError, match="vocab_size is 32"):
        prepare(recipe)
    recipe.model.config = {"model_type": "own"}  # code of the model's own: its size is known when it is built
    prepare(recipe)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_folder_that_names_its_class_loads_as_the_automatic_class_would(tokenizer, tmp_path, name):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tokenizer, tmp_path / "named")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": name}))
    ours, theirs = load_tokenizer(TokenizerSpec(str(folder))), AutoTokenizer.from_pretrained(str(folder))
    assert type(ours) is type(theirs)
    assert (ours.get_vocab(), ours.special_tokens_map) == (theirs.get_vocab(), theirs.special_tokens_map)
    assert ours.chat_template == theirs.chat_template
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_a_full_disk_names_the_cache_folder_and_what_to_do(make, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("launcher.data.store._sync", "launcher.data.parts.load", "launcher.data.lock.os.pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(UserError, match=r"data.cache_dir = .*the disk is full. Free space there"):
                prepare(make(pairs(3)))
    prepare(make(pairs(3)))


def test_the_end_token_that_a_bare_tokenizer_json_is_given_is_said(make, tokenizer):
    recipe = make(pairs(3))
    assert "documents end with" not in prepare(recipe).train["formats"][0]
    recipe.model.tokenizer = str(tokenizer / "tokenizer.json")
    (said,) = prepare(recipe).train["formats"]
    assert said.endswith("; documents end with <|endoftext|>, as tokenizer.json names no end token")


def test_a_tokenizer_that_drops_characters_is_warned_of(make, tokenizer, tmp_path):
    recipe = make(pairs(3))
    assert prepare(recipe).train["warnings"] == []
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    values["model"]["vocab"].pop("\u0122")
    (tmp_path / "poor.json").write_text(json.dumps(values))
    recipe.model.tokenizer = str(tmp_path / "poor.json")
    (warning,) = prepare(recipe).train["warnings"]
    assert "no token for 1 of 256 bytes and drops them" in warning


def test_a_record_that_loses_characters_is_counted_and_one_whose_answer_is_emptied_dropped(make, tokenizer, tmp_path):
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    for byte in ("\u00e4", "\u00b8", "\u0138"):  # the three of U+4E16, as byte-level vocabularies write them
        values["model"]["vocab"].pop(byte)
    (tmp_path / "poor.json").write_text(json.dumps(values))
    recipe = make([*pairs(3), {"prompt": "a \u4e16", "completion": "b"}, {"prompt": "a", "completion": "\u4e16" * 2}])
    recipe.model.tokenizer = str(tmp_path / "poor.json")
    found = prepare(recipe).train
    assert found["changed"] == {"characters left out that the tokenizer has no token for": 1}
    assert found["dropped"] == {"an answer of characters that the tokenizer has no token for": 1}
    with pytest.raises(UserError, match=r"characters left out .* record 3 \(row 4\)"):
        prepare(recipe, strict=True)


def test_a_cache_folder_that_cannot_be_written_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir = .*file.*cannot be written"):
        prepare(make(pairs(3), cache_dir=str(tmp_path / "file")))


def test_data_json_is_written_whole_and_refuses_other_data(make, tmp_path):
    pytest.importorskip("launcher.run.files")
    run = SimpleNamespace(data_file=tmp_path / "data.json")
    prepared = prepare(make(pairs(10)))
    write_data_json(run, prepared)
    assert json.loads(run.data_file.read_text()) == prepared.to_dict()
    write_data_json(run, prepare(make(pairs(10), steps={"max_steps": 3})))
    assert json.loads(run.data_file.read_text())["total_steps"] == 3
    other = prepare(make(pairs(11)))
    with pytest.raises(UserError, match="the train data is no longer what the run began with"):
        write_data_json(run, other)
    write_data_json(run, other, force=True)
    assert json.loads(run.data_file.read_text()) == other.to_dict()
