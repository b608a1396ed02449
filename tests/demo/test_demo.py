"""The demo's data are real and many, and its whole course works: stop, resume, export, answers, summary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.demo.corpus import messages, standard_library_pairs, write_jsonl


def test_the_standard_library_gives_several_thousand_distinct_questions():
    pairs = standard_library_pairs()
    questions = [question for question, _ in pairs]
    assert len(pairs) > 3000
    assert len(set(questions)) == len(questions)
    assert ("What does json.dumps do?", "Serialize ``obj`` to a JSON formatted ``str``.") in pairs
    assert any(question == "What does len do?" for question in questions)


def test_held_out_questions_are_not_trained(tmp_path: Path):
    pairs = [(f"question {i}", f"answer {i}") for i in range(50)]
    train, heldout = write_jsonl(pairs, tmp_path, num_held_out=10)
    read = [[json.loads(line)["messages"] for line in path.read_text().splitlines()] for path in (train, heldout)]
    assert [len(part) for part in read] == [40, 10]
    assert sorted(turn[1]["content"] for part in read for turn in part) == sorted(question for question, _ in pairs)
    assert messages(*pairs[0]) in read[0] + read[1]


@pytest.mark.slow
def test_a_short_demo_stops_resumes_exports_answers_and_sums_up(tmp_path: Path):
    changes = ["train.max_steps=12", "train.eval_every_steps=12", "logging.every_steps=1", "checkpoint.every_steps=50"]
    result = subprocess.run(
        [sys.executable, "-m", "launcher.demo", *changes], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    for part in ("ended with 75", "loss at resume", "evaluation loss", "tokens/s", "documentation:"):
        assert part in result.stdout
    run = tmp_path / "demo" / "runs" / "stdlib"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {m["attempt"] for m in metrics} == {1, 2}
    assert max(m["step"] for m in metrics) == 12
    assert (run / "final" / "model.safetensors").exists()
    assert (run / "loss.png").exists()
