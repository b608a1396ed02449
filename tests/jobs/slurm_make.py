"""Slurm jobs without a Slurm: specs of every shape, and a folder of stand-ins for its commands."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launcher.jobs.job import Job
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets import slurm
from launcher.jobs.targets.slurm_script import FILE
from launcher.recipe.schema import Cluster
from launcher.recipe.schema.restart import Restart
from launcher.recipe.schema.slurm import Container, Slurm


def spec(
    *,
    name: str = "big",
    run: Path | str = "/shared/runs/big",
    nodes: int = 2,
    min_nodes: int | None = None,
    ranks: int = 8,
    accelerator: str = "cuda",
    setup: tuple[str, ...] = (),
    env_names: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    minutes: int | None = 60,
    lead_s: int = 300,
    node_budget: int = 10,
    container: Container | None = None,
    **keys: object,
) -> JobSpec:
    """A job; `keys` are those of cluster.slurm."""
    cluster = Cluster(
        target="slurm", nodes=nodes, min_nodes=min_nodes, nproc_per_node=ranks, accelerator=accelerator,
        time_limit_min=minutes, stop_lead_s=lead_s, setup=list(setup), env=list(env_names),
        restart=Restart(node=node_budget),
        slurm=Slurm(container=container or Container(), **keys),
    )  # fmt: skip
    return JobSpec(
        name=name, run=str(run), cluster=cluster, env=env or {},
        files={"recipe.yaml": "{}\n", "plan.json": "{}\n"},
    )  # fmt: skip


def text(job: JobSpec) -> str:
    return slurm.render(job).files[FILE]


def options(script: str) -> dict[str, str]:
    """The #SBATCH lines by option."""
    lines = (line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH "))
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def job(folder: Path, *, id: str = "7", **more: str) -> Job:
    return Job(target="slurm", id=id, folder=folder, run=folder / "runs" / "big", more=more)


@dataclass(frozen=True)
class Site:
    """A folder with stand-ins for Slurm's commands first on PATH; each call of one is a line of its log."""

    folder: Path

    def command(self, name: str, lines: str) -> None:
        """A stand-in: bash lines."""
        bin = self.folder / "bin"
        bin.mkdir(exist_ok=True)
        log = self.folder / "calls"
        (bin / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{lines}\n')
        (bin / name).chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LAUNCHER_"))}
        slurm_own = {
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_CPUS_PER_NODE": "64(x3),32",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }  # fmt: skip
        return {**clean, **slurm_own, "PATH": self.path, **more}

    def run(self, script: str, **more: str) -> tuple[int, str]:
        """Its exit code and output, once it has ended."""
        (self.folder / FILE).write_text(script)
        done = subprocess.run(
            ["bash", FILE], capture_output=True, text=True, cwd=self.folder, env=self.environment(**more), timeout=120
        )
        return done.returncode, done.stdout + done.stderr
