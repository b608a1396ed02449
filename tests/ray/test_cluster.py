"""Runs on a real Ray of three nodes, submitted as a person would; each ends as it does without Ray, bit for bit."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

import pytest

from launcher.jobs import submissions
from launcher.jobs.job import Job, JobStatus
from launcher.run.control import read_outcomes
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.jobs.make import finish, in_files, launcher, losses, made_in, project, run_of, tensors_of, until
from tests.pages import DOCS, commands
from tests.ray.testbed import RayCluster, with_argument
from tests.slurm.make import last_step, story

pytestmark = [pytest.mark.gloo, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]

STEPS = 10
HELD = 5  # no multiple of `checkpoint.every_steps`
SECRET = "hush-8841-hush"


class Site:
    """A recipe of 2 nodes with a rank each, the cluster it goes to, and the folder both see."""

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = project(
            folder,
            train={"max_steps": STEPS},
            strategy={"kind": "fsdp2"},
            checkpoint={"every_steps": 4, "keep_last": 3},
            cluster={
                "target": "ray", "nodes": 2, "nproc_per_node": 1, "accelerator": "auto", "stop_lead_s": 240,
                "ray": {"address": cluster.address},
            },
        )  # fmt: skip
        (folder / "hold").mkdir()

    def run(self, name: str) -> RunDirectory:
        return run_of(self.recipe, name)

    def call(self, *arguments: str | Path, code: int = 0, **environment: str) -> str:
        """What a `launcher` command says, standard error behind."""
        env = {**self.cluster.environment, **environment}
        return "".join(finish(launcher(*arguments, cwd=self.folder, env=env), code=code))

    def submit(self, name: str, *changes: str, **environment: str) -> Job:
        self.call("submit", self.recipe, f"run.name={name}", *changes, **environment)
        return self.last(name)

    def last(self, name: str) -> Job:
        """The job of a run that was submitted last."""
        job = submissions.latest(self.run(name).path)
        assert job is not None
        return job

    def type(self, command: str) -> str:
        """What a line typed in a shell prints."""
        env = {**self.cluster.environment, "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET}
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert done.stdout.strip(), f"{command} printed nothing"
        return done.stdout

    def wait_for(self, job: Job, *states: str) -> JobStatus:
        """Until a job is in one of these states; a test that waits in vain tells what the job said."""

        def there() -> JobStatus | None:
            said = json.loads(self.call("status", job.run, "--json"))["job"]
            status = JobStatus(said["state"], said["reason"], said["nodes"])
            over = status.state in ("finished", "failed", "cancelled") and status.state not in states
            assert not over, f"{status}\n{self.output(job)}"
            return status if status.state in states else None

        try:
            return until(f"{job.id} {' or '.join(states)}", there, timeout_s=300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output(job)}") from None

    def output(self, job: Job) -> str:
        return self.call("logs", job.run, "--job")

    def hold(self, name: str, *, at: int = HELD) -> None:
        """Have a run stop short at step `at` of each attempt, until it is released or asked to stop."""
        (self.folder / "hold" / name).write_text(str(at))

    def release(self, name: str) -> None:
        (self.folder / "hold" / name).unlink()

    def wait_until_held(self, name: str, job: Job) -> None:
        """Figures are written up to two steps late."""
        try:
            until(f"{name} at step {HELD}", lambda: last_step(self.run(name), 1) >= HELD - 2, timeout_s=300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output(job)}") from None

    @functools.cached_property
    def whole(self) -> RunDirectory:
        """The same training without Ray and without interruption, 2 ranks on this machine."""
        self.call("run", self.recipe, "run.name=whole", "cluster.nodes=1", "cluster.nproc_per_node=2")
        return self.run("whole")

    def assert_exact(self, name: str) -> None:
        """A run has ended as if nothing had happened to it: every loss, and all weights and moments, bit for bit."""
        run = self.run(name)
        assert losses(run) == losses(self.whole)
        last = valid_checkpoints(run)[-1]
        assert last.step == STEPS
        assert tensors_of(last.path) == tensors_of(valid_checkpoints(self.whole)[-1].path)


@pytest.fixture(scope="module")
def site(cluster, tmp_path_factory):
    return Site(cluster, tmp_path_factory.mktemp("site"))


def test_the_commands_of_the_page_run_and_what_they_train_is_as_without_ray(site):
    """`first` runs to its end, `by-hand` by `ray job submit`, `second` is cancelled; the first two get a secret."""
    said = {command: site.type(command) for command in commands(DOCS / "ray.md")}
    site.assert_exact("first")
    assert story(site.run("first")) == [(1, 0, "finished")]
    [attempt], job = attempts(site.run("first")), site.last("first")
    assert (attempt.target, attempt.job_id) == ("ray", job.id)
    output = next(text for command, text in said.items() if command.startswith("launcher logs first --job"))
    assert f"step {STEPS}/{STEPS}" in output
    assert "CUDA_VISIBLE_DEVICES='0'" in output or "CUDA_VISIBLE_DEVICES='1'" in output  # a pretended GPU
    by_hand = site.run("by-hand")
    until(
        "the job that was submitted by hand has finished",
        lambda: read_state(by_hand).status == "finished",
        timeout_s=300,
    )
    assert losses(by_hand) == losses(site.whole)
    site.wait_for(site.last("second"), "cancelled")
    files = [file for file in site.folder.rglob("*") if file.is_file()]
    assert job.folder / "runtime_env.json" in files
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert "is finished" in site.call("submit", site.recipe, "run.name=first")


def test_a_node_lost_in_mid_run_is_replaced_and_the_run_goes_on_exactly(site, cluster):
    site.hold("lost")
    job = site.submit("lost")
    site.wait_until_held("lost", job)
    cluster.kill_node(_node_of_rank_0(site.run("lost"), cluster))
    assert site.wait_for(job, "queued", "preempted-will-return")
    asked = "the job asks for 2 nodes with CPU 1, GPU 1 each"
    until("what is missing is said", lambda: asked in site.output(job), timeout_s=300)
    site.release("lost")
    cluster.add_node()
    assert site.wait_for(job, "finished")
    site.assert_exact("lost")
    assert [restart for _, restart, _ in story(site.run("lost"))] == [0, 1]
    assert "is lost" in site.output(job)


def test_l5_a_job_with_min_nodes_goes_on_without_a_lost_node_and_grows_when_there_is_room(site, cluster):
    site.hold("elastic", at=3)  # far from the end, for three starts
    job, run = site.submit("elastic", "cluster.min_nodes=1"), site.run("elastic")
    until("the first steps", lambda: last_step(run, 1) > 0, timeout_s=300)
    first = _node_of_rank_0(run, cluster)
    cluster.kill_node(next(node for node in cluster.nodes if node is not first and node.poll() is None))
    until("a start with one node", lambda: last_step(run, 2) > 0, timeout_s=300)
    cluster.add_node()
    until("a start with two nodes", lambda: len(attempts(run)) == 3, timeout_s=300)
    site.release("elastic")
    assert site.wait_for(job, "finished")
    assert [len(a.nodes) if isinstance(a.nodes, list) else a.nodes for a in attempts(run)] == [2, 1, 2]
    assert story(run) == [(1, 0, "node"), (2, 1, "resize"), (3, 2, "finished")]
    assert "room for 1 more in the cluster, 1 of 2 take part" in site.output(job)
    whole = {step: loss for step, (loss, _) in losses(site.whole).items()}
    assert {step: loss for step, (loss, _) in losses(run).items()} == pytest.approx(whole, rel=1e-5)
    assert valid_checkpoints(run)[-1].step == STEPS


def test_a_cancelled_run_keeps_a_checkpoint_stays_cancelled_and_goes_on_when_submitted_again(site):
    site.hold("given-up")
    job = site.submit("given-up")
    site.wait_until_held("given-up", job)
    site.call("cancel", site.run("given-up").path)
    assert site.wait_for(job, "cancelled")
    run = site.run("given-up")
    assert [end for _, _, end in story(run)] == ["cancelled"]
    assert read_state(run).status == "cancelled"
    assert valid_checkpoints(run)[-1].step not in (0, 4, STEPS)  # written because of the request
    site.release("given-up")
    again = site.submit("given-up")
    assert again.id == f"given-up-{submissions.submissions(run.path)[-1].number}"
    assert site.wait_for(again, "finished")
    site.assert_exact("given-up")
    assert len(story(run)) == 2


def test_ray_job_stop_leaves_time_for_a_checkpoint(site):
    site.hold("stopped")
    job = site.submit("stopped")
    site.wait_until_held("stopped", job)
    stop = ["ray", "job", "stop", "--no-wait", job.id]
    env = {**site.cluster.environment, "RAY_API_SERVER_ADDRESS": site.cluster.address}
    subprocess.run(stop, env=env, check=True, capture_output=True)
    assert "STOPPED" in site.wait_for(job, "cancelled").reason
    run = site.run("stopped")
    assert [end for _, _, end in story(run)] == ["preemption"]
    assert {outcome.kind for outcome in read_outcomes(run, 1).values()} == {"stopped"}


def test_nodes_that_do_not_come_are_named_and_end_the_job_after_the_time_for_it(site):
    job = site.submit("waits", "cluster.nodes=3", "train.global_batch_size=6", "cluster.ray.autoscaling=true",
                      "cluster.join_timeout_s=12")  # fmt: skip
    asked = "the job asks for 3 nodes with CPU 1, GPU 1 each: of the cluster's 3 nodes 2 have that, 2 have it free now"
    status = site.wait_for(job, "failed")
    assert asked in status.reason
    assert "cluster.join_timeout_s" in status.reason
    assert asked in site.output(job)


def test_a_cluster_of_this_machine_is_made_for_the_job_and_ends_with_it(site):
    changes = ("cluster.nodes=1", "cluster.nproc_per_node=2", "cluster.ray.address=local")
    place = site.cluster.folder / "here"
    place.mkdir()
    site.call("submit", site.recipe, "run.name=here", *changes, "--wait", RAY_TMPDIR=str(place))
    site.assert_exact("here")
    until("nothing of it is left", lambda: not with_argument(str(place)))


def test_more_nodes_than_the_cluster_has_are_refused_before_anything_is_queued(site):
    said = site.call("submit", site.recipe, "run.name=large", "cluster.nodes=3", "train.global_batch_size=6", code=2)
    assert "2 of the cluster's 3 have CPU 1, GPU 1; the job asks for 3" in said
    assert "cluster.ray.autoscaling" in said
    assert not site.run("large").path.exists()


def _node_of_rank_0(run: RunDirectory, cluster: RayCluster):
    """The node whose worker leads the attempt: it wrote the ledger's start."""
    pid = attempts(run)[-1].pid
    assert pid is not None
    return cluster.node_with(pid)


def test_data_are_prepared_by_tasks_and_one_behind_them_as_by_one_process(site):
    source = f"data.train=[{{path: {in_files(site.folder, 3)}}}]"
    shared, alone = site.folder / "cache-shared", site.folder / "cache-alone"
    beyond = ("--target", "ray", "-n", "2", "-o", str(site.folder / "prepare"), "--submit")
    said = site.call("prepare", site.recipe, source, f"data.cache_dir={shared}", *beyond)
    look = next(line.partition("look:")[2] for line in said.splitlines() if "look:" in line)
    until("the merge has ended", lambda: "packing efficiency" in site.type(look), timeout_s=600)
    assert "tokenised: 2 of 2 shares" in site.type(look)
    site.call("prepare", site.recipe, source, f"data.cache_dir={alone}")
    until("all is there", lambda: made_in(shared) == made_in(alone), timeout_s=60)
