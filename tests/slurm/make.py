"""A tiny project beside a real Slurm: submits runs as a person would, holds them at a step, knows how they must end."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

from launcher.jobs import submissions
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from tests.jobs.make import finish, launcher, losses, project, run_of, tensors_of, until
from tests.slurm.testbed import Slurm, output

STEPS = 12
HELD = 6  # no multiple of `checkpoint.every_steps`
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # a job's states that nothing follows
BIN = Path(sys.executable).parent
HOLD = Path(__file__).parent / "hold"


class Site:
    """A recipe of 2 nodes x 2 ranks, the cluster it goes to, and the folder both see."""

    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = project(
            folder,
            run={"name": "big", "dir": "runs"},  # as docs/slurm.md has it
            train={"max_steps": STEPS},
            strategy={"kind": "fsdp2"},
            checkpoint={"every_steps": 4, "keep_last": 3},
            cluster={
                "target": "slurm", "nodes": 2, "nproc_per_node": 2, "preflight": False,
                "setup": [f"export PATH={BIN}:$PATH PYTHONPATH={HOLD}"],
            },
        )  # fmt: skip
        (folder / "hold").mkdir()

    def run(self, name: str) -> RunDirectory:
        return run_of(self.recipe, name)

    def call(self, *arguments: str | Path, code: int = 0, **environment: str) -> str:
        """What a `launcher` command says, standard error behind."""
        env = {**self.cluster.environment, **environment}
        return "".join(finish(launcher(*arguments, cwd=self.folder, env=env), code=code))

    def shell(self, command: str) -> str:
        """What a line of docs/slurm.md says, typed where `recipe.yaml` lies."""
        env = {**os.environ, **self.cluster.environment, "PATH": f"{BIN}:{os.environ['PATH']}"}
        return output("bash", "-c", command, cwd=self.folder, env=env)

    def submit(self, name: str, *changes: str, recipe: Path | None = None) -> str:
        """Hand a run over with `launcher submit`; the job's id."""
        self.call("submit", recipe or self.recipe, f"run.name={name}", *changes)
        return self.job_of(name)

    def job_of(self, name: str) -> str:
        """The id of the job that was submitted last for a run."""
        job = submissions.latest(self.run(name).path)
        assert job is not None
        return job.id

    def status(self, name: str) -> tuple[str, str]:
        """How a run stands and how its job does, as `launcher status` says."""
        said = json.loads(self.call("status", self.run(name).path, "--json"))
        return said["status"], said["job"]["state"]

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 400) -> dict[str, str]:
        """Until a job is in one of these states; a test that waits in vain tells what the job and its run say."""
        return self.cluster.wait_for(job_id, *states, timeout_s=timeout_s)

    def hold(self, name: str, *, node: str | None = None) -> None:
        """Have a run stop short at step `HELD` (if `node`: where its rank 0 is there) until it is released or asked."""
        self._hold_file(name, node).write_text(str(HELD))

    def release(self, name: str, *, node: str | None = None) -> None:
        self._hold_file(name, node).unlink()

    def wait_until_held(self, name: str, job_id: str, *, attempt: int = 1) -> None:
        """Until an attempt stands at that step; figures are written up to two steps late."""

        def there() -> bool:
            state = self.cluster.job(job_id).get("JobState")
            assert state not in ENDED, f"{state}\n{self.cluster.account_of(job_id)}"
            return last_step(self.run(name), attempt) >= HELD - 2

        until(f"{name} at step {HELD}", there, timeout_s=400)

    def nodes_of(self, job_id: str) -> list[str]:
        """Names of a job's nodes, the batch script's first."""
        nodes = self.cluster.job(job_id)["NodeList"]
        return self.cluster.command("scontrol", "show", "hostnames", nodes).split()

    @functools.cached_property
    def whole(self) -> RunDirectory:
        """The same training without Slurm and without interruption, 4 ranks on this machine."""
        return self.alone("whole", "cluster.nproc_per_node=4")

    def alone(self, name: str, *changes: str) -> RunDirectory:
        """A run without Slurm and without interruption on this machine."""
        self.call("run", self.recipe, f"run.name={name}", "cluster.nodes=1", "cluster.setup=[]", *changes)
        return self.run(name)

    def assert_exact(self, name: str, whole: RunDirectory | None = None) -> None:
        """A run has ended as if nothing had happened to it: every loss, and all weights and moments, bit for bit."""
        run, whole = self.run(name), whole or self.whole
        assert losses(run) == losses(whole)
        last, reference = valid_checkpoints(run)[-1], valid_checkpoints(whole)[-1]
        assert last.step == reference.step == max(losses(whole))
        assert tensors_of(last.path) == tensors_of(reference.path)

    def tidy(self) -> None:
        """No job, no held run and no missing node is left to the next test."""
        for file in (self.folder / "hold").iterdir():
            file.unlink()
        self.cluster.command("scancel", "--user=root")
        for node in self.cluster.nodes:
            self.cluster.heal(node)
        until("no job left", lambda: self.cluster.command("squeue", "--noheader") == "", timeout_s=120)

    def _hold_file(self, name: str, node: str | None) -> Path:
        return self.folder / "hold" / (name if node is None else f"{name}@{node}")


def last_step(run: RunDirectory, attempt: int) -> int:
    """The last step that an attempt has written the figures of."""
    steps = [0]
    for line in run.metrics_file.read_text().splitlines() if run.metrics_file.exists() else ():
        if line.endswith("}") and (values := json.loads(line)).get("attempt") == attempt and "loss" in values:
            steps.append(values["step"])
    return steps[-1]


def story(run: RunDirectory) -> list[tuple[int, int | None, str | None]]:
    """Attempts as (number, restart, class of the end)."""
    return [(attempt.number, attempt.restart, attempt.end_class) for attempt in attempts(run)]
