"""What `launcher worker` leaves for a job's script when it cannot begin."""

from __future__ import annotations

import io

import pytest

from launcher.errors import UserError
from launcher.jobs.console import Console
from launcher.jobs.worker import work
from launcher.run.control import read_verdict
from launcher.run.directory import RunDirectory
from launcher.run.ledger import end_attempt, start_attempt


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A function that starts the worker of a Slurm job with a recipe that cannot be."""
    for name, value in {"TARGET": "slurm", "JOB_ID": "7", "JOB_RESTART": "0"}.items():
        monkeypatch.setenv(f"LAUNCHER_{name}", value)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("strategy: {kind: fsdp3}\n")

    def begin(run: RunDirectory) -> None:
        with pytest.raises(UserError, match="fsdp3"):
            work(run, recipe_file=recipe, nodes=1, node_rank=0, console=Console(io.StringIO()))

    return begin


def test_l10_a_mistake_before_the_first_attempt_says_stop(tmp_path, begun):
    """Else the exit codes of nodes that are ended along with this one would be taken for a death without a word."""
    run = RunDirectory(tmp_path / "runs" / "new")
    begun(run)
    assert read_verdict(run) == "stop"


def test_an_attempt_that_may_live_is_not_spoken_for(tmp_path, begun):
    run = RunDirectory(tmp_path / "runs" / "live")
    attempt = start_attempt(run, target="slurm", job_id="6", nodes=["a"], reason="worker")
    begun(run)
    assert read_verdict(run) is None
    end_attempt(run, attempt, step=3, outcome_class="preemption")
    begun(run)
    assert read_verdict(run) == "stop"


def test_a_start_by_hand_leaves_no_word(tmp_path, begun, monkeypatch):
    for name in ("TARGET", "JOB_ID", "JOB_RESTART"):
        monkeypatch.delenv(f"LAUNCHER_{name}")
    run = RunDirectory(tmp_path / "runs" / "hand")
    begun(run)
    assert read_verdict(run) is None
