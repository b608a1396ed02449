"""A stream as a person meets it: prepared by `run`, stopped, and gone on with on another number of ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launcher.run.ledger import valid_checkpoints
from tests.jobs.make import finish, launcher, losses, project, run_of, until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def test_a_stream_is_run_stopped_and_gone_on_with_on_another_number_of_ranks(tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "data.jsonl")}
    data = {"train": [source], "seq_len": 128, "streaming": True, "shuffle_buffer": 8, "cache_dir": str(tmp_path / "c")}
    steps = {"global_batch_size": 4, "max_steps": 40, "precision": "fp32"}
    recipe = project(tmp_path, data=data, train=steps, checkpoint={"every_steps": 10, "async_save": True})
    process = launcher("run", recipe)
    run = run_of(recipe, "tiny")
    until("some steps", lambda: len(losses(run)) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    stopped = len(losses(run))
    assert 3 <= stopped < 40
    assert run.read_json("data.json")["train"]["formats"] == [f"{source['path']}: recognised as messages; streamed"]
    out, _ = finish(launcher("resume", run.path, "cluster.nproc_per_node=1"), code=0)
    assert f"resumed at step {stopped} of 40" in out
    assert sorted(losses(run)) == list(range(1, 41))
    manifest = json.loads((valid_checkpoints(run)[-1].path / "manifest.json").read_text())
    assert [(file["rank"], file["lanes"]) for file in manifest["stream"]] == [(0, [0, 1, 2, 3])]
    assert run.read_json("data.json")["train"]["streaming"]
    assert run.read_json("plan.json")["total_steps"] == 40
