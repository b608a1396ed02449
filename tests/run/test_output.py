"""Output and last words on a full disk: /dev/full refuses as one does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.run.control import Outcome, read_outcomes, request_stop, stop_requested, write_outcome
from launcher.run.output import PatientStream
from launcher.run.reserve import give_up, insist, keep_back
from tests.run.make import make_run


def test_text_that_a_full_disk_does_not_take_waits_and_trouble_is_told_once_each_time(tmp_path: Path):
    told: list[str] = []
    file, full = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (tmp_path / "log", "/dev/full"))
    handle = os.dup(file)
    stream = PatientStream(handle, told.append)
    try:
        print("one", file=stream)
        os.dup2(full, handle)
        print("two", file=stream)
        print("three", file=stream, flush=True)
        assert told == ["No space left on device"]
        os.dup2(file, handle)
        print("four", file=stream)
        assert (tmp_path / "log").read_text() == "one\ntwo\nthree\nfour\n"
        os.dup2(full, handle)
        print("five", file=stream)
        assert len(told) == 2
    finally:
        for number in (file, full, handle):
            os.close(number)


def test_text_that_waits_is_bounded_and_says_that_lines_are_missing(tmp_path: Path):
    file, full = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (tmp_path / "log", "/dev/full"))
    stream = PatientStream(full)
    try:
        for number in range(30_000):
            print(f"{number:99d}", file=stream)
        os.dup2(file, full)
        stream.flush()
    finally:
        os.close(file)
        os.close(full)
    first, *lines = (tmp_path / "log").read_text().splitlines()
    assert first == "[lines are missing here: the disk was full]"
    assert {len(line) for line in lines} == {99}
    assert int(lines[-1]) == 29_999
    assert len(lines) < 12_000


def test_a_reader_that_has_gone_raises_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    stream = PatientStream(writer)
    print("nobody hears this", file=stream, flush=True)
    os.close(writer)


def test_what_fails_gives_the_reserve_up_and_is_tried_again(tmp_path: Path):
    reserve = tmp_path / ".reserve"
    keep_back(reserve)
    assert reserve.stat().st_size == 16 << 10

    def write() -> None:
        if reserve.exists():
            raise OSError(28, "No space left on device")

    insist(write, reserve)
    assert not reserve.exists()
    give_up(reserve)

    def never() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        insist(never, reserve)


def test_an_outcome_leaves_no_reserve_and_fits_into_one_whatever_the_traceback(tmp_path: Path):
    run = make_run(tmp_path)
    keep_back(run.rank_reserve(0))
    write_outcome(run, 1, 0, Outcome("failed", "unknown", 3, "x", "\n" * 100_000 + "the end"))
    assert read_outcomes(run, 1)[0].traceback.endswith("the end")
    assert [path.name for path in (run.control / "outcome").iterdir()] == ["1-0.json"]
    assert len((run.control / "outcome" / "1-0.json").read_bytes()) < 17_000


def test_a_stop_that_has_no_space_for_its_reason_is_an_empty_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launcher.run import control

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path)
    monkeypatch.setattr(control, "write_atomic", full)
    request_stop(run, "Ctrl-C")
    assert stop_requested(run)
    assert (run.control / "stop-request").read_text() == ""
