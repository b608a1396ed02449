"""docs/slurm.md: each command as a reader types it, on a real Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.jobs.submissions import latest
from tests.jobs.make import project, until
from tests.pages import DOCS, commands
from tests.slurm.make import BIN
from tests.slurm.testbed import Slurm, slurm

pytestmark = pytest.mark.gloo


def typed(cluster: Slurm, folder: Path, command: str) -> str:
    """What a command prints; it succeeds."""
    environment = {
        **os.environ, **cluster.environment, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_of_the_page_runs(tmp_path):
    project(
        tmp_path,
        run={"name": "big"},
        train={"max_steps": 4},
        cluster={
            "nproc_per_node": 1,
            "time_limit_min": 30,
            "slurm": {"exclusive": False, "mem": "1G", "cpus_per_node": 2},
        },
    )
    run = tmp_path / "runs" / "big"
    with slurm(nodes=2) as cluster:

        def state_of(job: str) -> str:
            return cluster.job(job).get("JobState", "")

        for command in commands(DOCS / "slurm.md"):
            if command.startswith("launcher logs"):
                job = latest(run)
                assert job is not None
                until("output", (job.folder / f"slurm-{job.id}.out").exists)
            if "sbatch" in command and "cd job" in command:  # the run is free once its cancelled job is gone
                job = latest(run)
                assert job is not None
                until("the first job's end", lambda id=job.id: state_of(id) in ("CANCELLED", "COMPLETED"))
            said = typed(cluster, tmp_path, command)
            assert said.strip(), f"{command} printed nothing"
            if command.startswith("launcher render") and "-o" not in command:
                assert "sbatch --test-only" in said
            if command.startswith("cd job"):
                by_hand = said.split()[-1]
        elements = [latest(path.parent) for path in (tmp_path / "runs").glob("big-lr-*/run.json")]
        assert len(elements) == 4
        cluster.command("scancel", *(job.id for job in elements if job is not None))
        until("the job by hand", lambda: state_of(by_hand) in ("COMPLETED", "FAILED"))
        assert state_of(by_hand) == "COMPLETED", (tmp_path / "job" / f"slurm-{by_hand}.out").read_text()
        until("an empty queue", lambda: cluster.command("squeue", "--noheader") == "")
