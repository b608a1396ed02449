"""Following files, and what is said where there is no terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

from launcher.jobs.console import Console, Follower


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_follower_gives_whole_lines_once_and_the_rest_at_the_end(tmp_path: Path):
    follower = Follower(tmp_path, "*/0.log")
    assert follower.lines() == []
    (tmp_path / "node").mkdir()
    log = tmp_path / "node" / "0.log"
    log.write_text("one\ntw")
    assert follower.lines() == ["one"]
    with log.open("a") as more:
        more.write("o\nthree")
    assert follower.lines() == ["two"]
    assert follower.rest() == ["three"]
    assert follower.rest() == []


def test_rank_0s_lines_are_streamed_where_there_is_no_terminal(tmp_path: Path):
    stream = io.StringIO()
    console = Console(stream)
    console.watch(logs=tmp_path, metrics=tmp_path / "metrics.jsonl", total_steps=2)
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "0.log").write_text("step 1\nstep 2")
    (tmp_path / "node" / "1.log").write_text("not shown\n")
    console.close()
    assert stream.getvalue() == "step 1\nstep 2\n"


def test_progress_without_a_terminal_is_a_line_each_tenth():
    stream = io.StringIO()
    console = Console(stream)
    for done in range(101):
        console.working("tokenising", done, 100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "tokenising: 100 of 100"


def test_a_terminal_gets_a_bar_fed_by_metrics_that_come_after_the_start(tmp_path: Path):
    stream, metrics = Terminal(), tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    console = Console(stream)
    console.watch(logs=tmp_path, metrics=metrics, total_steps=9)
    with metrics.open("a") as more:
        more.write(json.dumps({"step": 8, "loss": 0.5, "tokens_per_s": 1200.0}) + "\n" + '{"torn')
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "0.log").write_text("step 8/9 loss\nwarning: disk full\n")
    console.poll()
    console.say("a message")
    console.close()
    shown = stream.getvalue()
    assert "8/9" in shown
    assert "0.5000" in shown
    assert "a message" in shown
    assert "warning: disk full" in shown
    assert "step 8/9" not in shown
    assert "7/9" not in shown
