"""What a person reads when a run ends for a reason that is known: its message once, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run.control import read_outcomes, read_verdict
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.left_out import left_out
from launcher.run.state import read_state
from tests.jobs.make import finish, launcher, losses, project, run_of

pytestmark = pytest.mark.gloo

EXPLODES = ["optimizer.lr=1.0e+30", "optimizer.warmup_steps=0", "train.max_grad_norm=null", "train.max_steps=40"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return project(tmp_path_factory.mktemp("project"))


def test_a_loss_that_is_not_finite_is_said_once_without_traceback(recipe: Path):
    out, err = finish(launcher("run", recipe, "run.name=stop", *EXPLODES), code=1)
    assert "Traceback" not in out + err
    assert (out + err).count("is not finite; the weights were left as they were") == 1
    assert "rank 0, step" not in out
    assert not read_outcomes(run_of(recipe, "stop"), 1)[0].traceback
    assert attempts(run_of(recipe, "stop"))[-1].end_class == "non_finite"


def test_skipping_goes_back_once_after_so_many_steps_in_a_row_and_then_gives_up(recipe: Path):
    skip = ["run.name=skip", *EXPLODES, "train.on_nonfinite=skip", "train.max_skips=10"]
    out, err = finish(launcher("run", recipe, *skip), code=1)
    assert "Traceback" not in out + err
    assert "so leaving batches out does not help" in out + err
    run = run_of(recipe, "skip")
    assert [attempt.end_class for attempt in attempts(run)] == ["non_finite"] * 2
    assert len(left_out(run)) == 10
    assert (read_state(run).status, read_verdict(run)) == ("failed", "stop")
    assert len(losses(run)) < 20


def test_checkpoints_that_are_all_bad_are_said_once_without_traceback(recipe: Path):
    finish(launcher("run", recipe, "run.name=bad"), code=0)
    run = run_of(recipe, "bad")
    for reference in valid_checkpoints(run):
        for file in reference.path.glob("*.safetensors"):
            with file.open("r+b") as stream:
                stream.truncate(100)
    out, err = finish(launcher("resume", run.path, "train.max_steps=8", "optimizer.schedule_steps=8"), code=1)
    assert "Traceback" not in out + err
    assert (out + err).count("every checkpoint of this run is bad") == 1


def test_an_error_that_nobody_foresaw_keeps_its_traceback(recipe: Path):
    finish(launcher("run", recipe, "run.name=unforeseen"), code=0)
    run = run_of(recipe, "unforeseen")
    record = json.loads(run.run_file.read_text())
    del record["run_id"]
    run.run_file.write_text(json.dumps(record))
    out, _ = finish(
        launcher("resume", run.path, "train.max_steps=8", "optimizer.schedule_steps=8", "cluster.restart.unknown=0"),
        code=1,
    )
    assert out.count("Traceback (most recent call last)") == 1
    assert "KeyError: 'run_id'" in out.splitlines()[-3]  # then its verdict, and where the logs are


_IN_A_STORE = """
import sys, threading
from datetime import timedelta
from torch.distributed import TCPStore
import launcher.cli as cli

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

def main():
    threading.Thread(target=lambda: store.get("never set"), daemon=True).start()
    sys.exit(2)

cli.main = main
cli.entry()
"""


def test_a_thread_that_waits_in_torchs_store_does_not_change_the_exit_code():
    """Left to the interpreter's shutdown, it aborts the process now and then (SIGABRT)."""
    ended = [subprocess.run([sys.executable, "-c", _IN_A_STORE], capture_output=True, text=True) for _ in range(3)]
    assert [(done.returncode, done.stderr) for done in ended] == [(2, "")] * 3
