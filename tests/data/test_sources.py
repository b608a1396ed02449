"""Files of every kind give their records row for row; a broken one is named with its line."""

from __future__ import annotations

import json

import pytest

from launcher.data.sources import find, fingerprint, load, records
from launcher.errors import UserError
from launcher.recipe.schema import Source
from tests.data.make import write_jsonl

RECORDS = [{"prompt": "a, b", "completion": "1"}, {"prompt": 'say "c"', "completion": "2020-01-01"}]


def tables(path, scratch, **source):
    return load(find(Source(path=str(path), **source)), scratch / "arrow")


def write(path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    if path.suffix == ".jsonl":
        write_jsonl(path, RECORDS)
    elif path.name == "data.json":
        path.write_text(json.dumps({"data": RECORDS}, indent=2))
    elif path.suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    elif path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".tsv":
        table.to_csv(path, sep="\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "data.json", "r.csv", "r.tsv", "r.parquet", "saved"])
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (table,) = tables(write(tmp_path / name), tmp_path)
    assert [dict(record) for record in table] == RECORDS


def test_text_files_give_a_record_a_line(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    (table,) = tables(tmp_path / "t.txt", tmp_path)
    assert table["text"][:] == ["one", "", "two"]


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    (table,) = tables(write_jsonl(tmp_path / "d.jsonl", [{"text": "2020-01-01"}, {"text": "2021-01-01"}]), tmp_path)
    assert table["text"][:] == ["2020-01-01", "2021-01-01"]


def test_folders_and_globs_give_their_files_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "skipped.md"):
        write_jsonl(tmp_path / name, [{"text": name}])
    for path in (tmp_path, tmp_path / "*.jsonl"):
        listing = find(Source(path=str(path)))
        assert [name.rsplit("/")[-1] for name in listing.names] == ["a.jsonl", "b.jsonl"]
        assert [table["text"][0] for table in load(listing, tmp_path / "arrow")] == ["a.jsonl", "b.jsonl"]


def test_a_hub_dataset_is_asked_for_by_id_subset_and_split(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    listing = find(Source(path="org/name", subset="en", split="train[:1%]"))
    assert load(listing, tmp_path)[0][0] == RECORDS[0]
    assert asked == [(("org/name",), {"name": "en", "split": "train[:1%]"})]
    assert fingerprint(listing) == fingerprint(listing)


def test_the_fingerprint_follows_the_content_and_not_the_place_or_time(tmp_path):
    first, second = write_jsonl(tmp_path / "a.jsonl", RECORDS), write_jsonl(tmp_path / "b.jsonl", RECORDS)
    before = fingerprint(find(Source(path=str(first))))
    assert before == fingerprint(find(Source(path=str(second))))
    write_jsonl(first, RECORDS[::-1])
    assert fingerprint(find(Source(path=str(first)))) != before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/recrods.jsonl", r"no such file or folder\. Did you mean 'records.jsonl'\?"),
        ("{}/*.csv", "the pattern matches no file"),
        ("{}/empty", "the folder holds no .json, .jsonl"),
        ("{}/notes.docx", "cannot read '.docx' files, expected .json"),
    ],
)
def test_a_path_that_names_nothing_readable_is_refused(path, message, tmp_path):
    write_jsonl(tmp_path / "records.jsonl", RECORDS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(UserError, match=message):
        find(Source(path=path.format(tmp_path)))


def test_a_split_of_a_file_is_refused_rather_than_ignored(tmp_path):
    with pytest.raises(UserError, match="split = test, but files have none"):
        find(Source(path=str(write_jsonl(tmp_path / "a.jsonl", RECORDS)), split="test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "a.jsonl: line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "a.jsonl: line 2: a record is an object with named columns, not int"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "a.json: not JSON: .*line 1 column"),
        ("a.csv", b"text\n\xe9\xe8\n", "a.csv: cannot be read as csv"),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read as parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tables(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.txt", "")]
)
def test_an_empty_file_has_no_records(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    (table,) = tables(tmp_path / name, tmp_path)
    assert len(table) == 0


def test_bytes_that_are_not_utf8_are_found_when_read_and_named_with_their_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 20 + b'{"text": "\xe9"}\n' + b'{"text": "a"}\n' * 9)
    (table,) = tables(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"a.jsonl: record 20 \(row 21\): not UTF-8"):
        records(table, 0, 30, "a.jsonl")
