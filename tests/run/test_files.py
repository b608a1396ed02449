"""Files of the run directory are whole or not there."""

from __future__ import annotations

import json
import os

import pytest

from launcher.run.files import append_line, read_json, read_lines, write_atomic


def test_write_replaces_the_file_and_leaves_no_other(tmp_path):
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new", durable=False)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_atomic(tmp_path / "a", "x")
    assert [os.path.dirname(synced[0]), synced[1]] == [str(tmp_path), str(tmp_path)]
    assert len(synced) == 2


def test_line_cut_at_any_byte_is_skipped_and_closed_by_the_next_append(tmp_path):
    whole, cut = json.dumps({"n": 1}) + "\n", json.dumps({"n": 2, "text": "abc"})
    for length in range(len(cut)):
        path = tmp_path / f"{length}.jsonl"
        path.write_text(whole + cut[:length])
        assert list(read_lines(path)) == [{"n": 1}]
        append_line(path, {"n": 3})
        assert list(read_lines(path)) == [{"n": 1}, {"n": 3}]
        append_line(path, {"n": 4})
        assert [line["n"] for line in read_lines(path)] == [1, 3, 4]


def test_line_that_lacks_only_its_end_counts_before_and_after_the_next_append(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}')
    assert list(read_lines(path)) == [{"n": 1}]
    append_line(path, {"n": 2})
    assert list(read_lines(path)) == [{"n": 1}, {"n": 2}]


def test_binary_rubbish_and_other_json_are_no_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n"x"\n{"n": 1}\n\n')
    assert list(read_lines(path)) == [{"n": 1}]
    assert list(read_lines(tmp_path / "missing")) == []


def test_missing_empty_and_damaged_json_read_as_none(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "good").write_text('{"a": 1}')
    assert [read_json(tmp_path / name) for name in ("missing", "empty", "list", "good")] == [None, None, None, {"a": 1}]
