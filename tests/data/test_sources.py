"""Files of every kind give their records row for row; a broken one is named with its line."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil

import pytest

from launcher.data.sources import find, fingerprint, load, record_number, records
from launcher.errors import UserError
from launcher.recipe.schema import Source
from tests.data.make import write_jsonl

RECORDS = [{"prompt": "a, b", "completion": "1"}, {"prompt": 'say "c"', "completion": "2020-01-01"}]


def tables(path, scratch, **source):
    return load(find(Source(path=str(path), **source)), scratch / "arrow")


def rows(table):
    return records(table, 0, len(table), "file")


def write(path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    if path.suffix == ".jsonl":
        write_jsonl(path, RECORDS)
    elif path.name == "data.json":
        path.write_text(json.dumps({"data": RECORDS}, indent=2))
    elif path.name == "long.json":
        path.write_text(json.dumps({"version": {"data": [1]}, "data": RECORDS, "end": 0}, indent=2))
    elif path.name == "line.json":
        path.write_text(json.dumps({"version": 1, "data": RECORDS}))
    elif path.suffix == ".json":
        path.write_text(json.dumps(RECORDS, indent=path.name == "lines.json" or None))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(write(path.with_suffix("")).read_bytes()))
    elif path.suffix == ".arrow":
        table.to_parquet(path.with_suffix(".parquet"))
        table.save_to_disk(path.with_suffix(""))
        shutil.copy(path.with_suffix("") / "data-00000-of-00001.arrow", path)
    elif path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".tsv":
        table.to_csv(path, sep="\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "r.jsonl",
        "r.json",
        "lines.json",
        "data.json",
        "long.json",
        "line.json",
        "r.csv",
        "r.tsv",
        "r.parquet",
        "saved",
        "r.jsonl.gz",
        "r.csv.gz",
        "r.arrow",
    ],
)
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    (table,) = tables(write(tmp_path / name), tmp_path)
    assert rows(table) == RECORDS
    assert (len(table), table.column_names, table.data.nbytes > 0) == (2, ["prompt", "completion"], True)
    assert rows(pickle.loads(pickle.dumps(table)).select(range(1, 2))) == RECORDS[1:]
    assert rows(table.select([])) == []


def test_text_files_give_a_record_a_line(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    (table,) = tables(tmp_path / "t.txt", tmp_path)
    assert [r["text"] for r in rows(table)] == ["one", "", "two"]


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    (table,) = tables(write_jsonl(tmp_path / "d.jsonl", [{"text": "2020-01-01"}, {"text": "2021-01-01"}]), tmp_path)
    assert [r["text"] for r in rows(table)] == ["2020-01-01", "2021-01-01"]


def test_folders_and_globs_give_their_files_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "skipped.md"):
        write_jsonl(tmp_path / name, [{"text": name}])
    for path in (tmp_path, tmp_path / "*.jsonl"):
        listing = find(Source(path=str(path)))
        assert [name.rsplit("/")[-1] for name in listing.names] == ["a.jsonl", "b.jsonl"]
        assert [rows(table)[0]["text"] for table in load(listing, tmp_path / "arrow")] == ["a.jsonl", "b.jsonl"]


def test_a_hub_dataset_is_asked_for_by_id_subset_and_split(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    listing = find(Source(path="org/name", subset="en", split="train[:1%]"))
    assert rows(load(listing, tmp_path)[0]) == RECORDS
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
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', r"a.jsonl: record 1 \(row 2\), line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "line 2: a record is an object with named columns, not int"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "a.json: line 1: not JSON: Expecting value"),
        ("a.csv", b"text\n\xe9\xe8\n", "a.csv: cannot be read as csv"),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read as parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows(*tables(tmp_path / name, tmp_path))


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
    with pytest.raises(UserError, match=r"a.jsonl: record 20 \(row 21\), line 21: not UTF-8"):
        records(table, 0, 30, "a.jsonl")


def test_records_keep_what_they_are_whatever_the_others_hold(tmp_path):
    mixed = [{"a": 1}, {"a": {"b": None}}, {"a": [1, "x"], "c": True}, {"a": {"d": 2}}]
    (table,) = tables(write_jsonl(tmp_path / "a.jsonl", mixed), tmp_path)
    assert rows(table) == mixed


def test_keys_that_a_table_gave_to_other_records_are_taken_away_again(tmp_path):
    import datasets

    calls = [{"messages": [{"role": "tool", "args": {"a": 1}}]}, {"messages": [{"role": "tool", "args": {"b": 2}}]}]
    datasets.Dataset.from_list(calls).to_parquet(tmp_path / "a.parquet")
    assert rows(*tables(tmp_path / "a.parquet", tmp_path)) == calls


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize("list_of_them", [False, True])
def test_records_are_found_over_the_borders_of_what_is_read_at_once(chunk, list_of_them, tmp_path, monkeypatch):
    from launcher.data import lines

    monkeypatch.setattr(lines, "_CHUNK", chunk)
    many = [{"text": f"{i} " * (i % 40) + "é\n]}"} for i in range(60)]
    texts = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(many)]
    text = f"[{' , '.join(texts)} ]" if list_of_them else "\ufeff" + "\n \n\r\n".join(texts)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (table,) = tables(tmp_path / "a.jsonl", tmp_path)
    assert rows(table) == many


def test_a_number_behind_the_path_takes_so_many_records(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    listing = find(Source(path=f"{path}#1"))
    assert (listing.source.max_samples, listing.names) == (1, [str(path)])
    with pytest.raises(UserError, match="#1 and max_samples = 2 say the same thing"):
        find(Source(path=f"{path}#1", max_samples=2))
    with pytest.raises(UserError, match="#0: expected 1 or more records"):
        find(Source(path=f"{path}#0"))
    (tmp_path / "b#2").mkdir()
    write_jsonl(tmp_path / "b#2" / "a.jsonl", RECORDS)
    assert find(Source(path=str(tmp_path / "b#2"))).source.max_samples is None


@pytest.fixture
def store():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/box/a.jsonl", b'{"text": "a"}\n')
    memory.pipe("/box/b.jsonl.gz", gzip.compress(b'{"text": "b"}\n'))
    memory.pipe("/box/readme.md", b"no")
    yield memory
    memory.rm("/box", recursive=True)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("memory://box", ["a.jsonl", "b.jsonl.gz"]),
        ("memory://box/*.jsonl", ["a.jsonl"]),
        ("memory://box/a.jsonl", ["a.jsonl"]),
        ("memory://box/*#1", ["a.jsonl", "b.jsonl.gz"]),
    ],
)
def test_files_of_another_store_are_listed_and_fetched(path, names, store, tmp_path):
    listing = find(Source(path=path))
    assert [name.rsplit("/")[-1] for name in listing.names] == names
    assert all(name.startswith("memory://") for name in listing.names)
    assert [rows(table)[0]["text"] for table in load(listing, tmp_path)] == [name[0] for name in names]
    before = fingerprint(listing)
    assert before == fingerprint(listing)
    store.pipe("/box/a.jsonl", b'{"text": "c"}\n')
    assert fingerprint(listing) != before


def test_what_another_store_lacks_is_said(store, monkeypatch):
    import fsspec

    with pytest.raises(UserError, match=r"c\.jsonl: no such file or folder"):
        find(Source(path="memory://box/c.jsonl"))

    def missing(path):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"Install s3fs to access S3.*pip install 'train-launcher\[cloud\]'"):
        find(Source(path="s3://bucket/a.jsonl"))


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (20, 20)])
def test_a_drawn_table_gives_each_record_once_before_any_twice(count, expected):
    from launcher.data.sources import _drawn

    class Table:
        def __init__(self, begin, end):
            self.values = range(begin, end)
            self.column_names, self.data = ["n"], type("Data", (), {"nbytes": 10})

        def __len__(self):
            return len(self.values)

        def records(self, begin, end):
            return [{"n": self.values[i]} for i in range(begin, end)]

    drawn = _drawn([Table(0, 5), Table(5, 12)], count)
    found = [record["n"] for table in drawn for record in rows(table)]
    assert len(found) == expected
    assert len(set(found)) == min(count, 12)
    assert [record_number(drawn[1], i) + 5 for i in range(len(drawn[1]))] == found[len(drawn[0]) :]
    assert [r for t in _drawn([Table(0, 5), Table(5, 12)], count) for r in rows(t)] == [{"n": n} for n in found]
