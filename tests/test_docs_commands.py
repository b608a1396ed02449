"""One page a target, each with the same five answers; what the pages of this machine's own targets say is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import VERBS
from launcher.jobs.job import OVER
from launcher.jobs.submissions import latest
from launcher.jobs.targets import TARGETS
from launcher.jobs.targets.process import status
from tests.jobs.make import project, until
from tests.pages import DOCS, commands, launcher_commands

HERE = ("torchrun", "accelerate")  # the schedulers' pages are typed in tests/slurm, tests/ray and tests/jobs


@pytest.mark.parametrize("target", TARGETS)
def test_a_page_says_what_you_need_one_command_preemption_how_to_look_and_how_to_stop(target):
    page = DOCS / f"{target}.md"
    text = page.read_text().lower()
    for part in ("what you need", "what happens", "stop"):
        assert part in text
    verbs = {arguments[0] for arguments in launcher_commands(page)}
    assert {"render", "submit", "status", "cancel"} <= verbs <= set(VERBS)


@pytest.mark.gloo
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", HERE)
def test_every_command_of_the_page_runs(target, tmp_path):
    project(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    try:
        for command in commands(DOCS / f"{target}.md"):
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            assert done.stdout.strip(), f"{command} printed nothing"
    finally:
        jobs = [job for run in (tmp_path / "runs").glob("*") if (job := latest(run)) is not None]
        until("every job has ended", lambda: all(status(job).state in OVER for job in jobs), timeout_s=400)
    assert "cancelled" in {status(job).state for job in jobs}
