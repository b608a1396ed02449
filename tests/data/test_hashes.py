"""A file is hashed again when, and only when, it may have changed."""

from __future__ import annotations

import os
import time

import pytest
import xxhash

from launcher.data import hashes
from launcher.data.hashes import file_hash


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv("LAUNCHER_REHASH", raising=False)
    monkeypatch.setattr(hashes, "_SETTLED_NS", 0)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"some records")
    time.sleep(0.02)
    return path


@pytest.fixture
def reads(monkeypatch):
    """How often a file was read."""
    times = []
    right = xxhash.xxh3_128
    monkeypatch.setattr(hashes.xxhash, "xxh3_128", lambda: times.append(1) or right())
    return times


def test_an_unchanged_file_is_read_once(file, reads, tmp_path):
    found = {file_hash(file, tmp_path / "files") for _ in range(3)}
    assert found == {xxhash.xxh3_128_hexdigest(b"some records")}
    assert len(reads) == 1


def test_a_changed_file_is_read_again_whatever_its_time_says(file, reads, tmp_path):
    before, stat = file_hash(file, tmp_path / "files"), file.stat()
    file.write_bytes(b"other things")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hash(file, tmp_path / "files") != before
    assert len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered(file, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_NS", 60_000_000_000)
    assert file_hash(file, tmp_path / "files") == file_hash(file, tmp_path / "files")
    assert len(reads) == 2


def test_a_person_can_ask_for_it(file, reads, tmp_path, monkeypatch):
    file_hash(file, tmp_path / "files")
    monkeypatch.setenv("LAUNCHER_REHASH", "1")
    file_hash(file, tmp_path / "files")
    assert len(reads) == 2


def test_a_broken_note_is_no_note(file, reads, tmp_path):
    file_hash(file, tmp_path / "files")
    (note,) = (tmp_path / "files").iterdir()
    note.write_text("[")
    assert file_hash(file, tmp_path / "files") == file_hash(file)
    assert len(reads) == 3
