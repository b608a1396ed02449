"""Runs on a real Slurm: whatever interrupts them, they end as if nothing had; and what must not come back does not.

All share one cluster of four nodes and one recipe (tests/slurm/make.py). A test holds a run at a step before it acts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.jobs.opening import stored_recipe
from launcher.run.control import read_outcomes
from launcher.run.ledger import attempts, valid_checkpoints
from tests.jobs.make import in_files, losses, made_in, until
from tests.slurm.make import STEPS, Site, story
from tests.slurm.testbed import slurm

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster_and_project(tmp_path_factory) -> Iterator[Site]:
    with slurm(cpus=32) as cluster:
        yield Site(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def site(cluster_and_project) -> Iterator[Site]:
    yield cluster_and_project
    cluster_and_project.tidy()


def test_l4_two_nodes_end_like_one_and_their_logs_are_found(site):
    job = site.submit("plain", "cluster.preflight=true")
    site.wait_for(job, "COMPLETED")
    site.assert_exact("plain")
    run = site.run("plain")
    assert story(run) == [(1, 0, "finished")]
    assert {path.parent.name + "/" + path.name for path in run.path.glob("logs/attempt-1/*/[0-9].log")} == {
        "node1/0.log", "node1/1.log", "node2/2.log", "node2/3.log",
    }  # fmt: skip
    assert f"step {STEPS}/{STEPS}" in site.call("logs", run.path)
    assert site.status("plain") == ("finished", "finished")
    assert f"slurm {job} finished" in site.call("status", run.path)
    assert "finished" in site.call("runs", run.path.parent)


@pytest.mark.slow
def test_l9_the_time_limit_itself_saves_requeues_and_ends_exactly(site):
    """The first start is held until it is asked to stop; how many more are needed is up to the machine.

    On a slow one the last step may fall on the limit itself, which to Slurm is a TIMEOUT.
    """
    site.hold("timed")
    job = site.submit("timed", "cluster.time_limit_min=2", "cluster.stop_lead_s=75")
    until("its time limit", lambda: site.cluster.job(job)["Restarts"] == "1", timeout_s=400)
    site.release("timed")
    site.wait_for(job, "COMPLETED", "TIMEOUT", timeout_s=900)
    assert site.status("timed") == ("finished", "finished")
    site.assert_exact("timed")
    *before, last = story(site.run("timed"))
    assert {end for _, _, end in before} == {"preemption"}
    assert last[2] == "finished"


def test_l9_a_job_that_is_more_urgent_has_the_nodes_and_gives_them_back(site):
    site.hold("modest")
    job = site.submit("modest")
    site.wait_until_held("modest", job)
    urgent = site.cluster.command(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null",
        "--wrap=srun sleep 600",
    )  # fmt: skip
    site.wait_for(urgent, "RUNNING")
    site.release("modest")
    assert site.cluster.job(job)["JobState"] == "PENDING"
    assert site.status("modest") == ("preempted", "preempted-will-return")
    site.cluster.command("scancel", urgent)
    site.wait_for(job, "COMPLETED")
    site.assert_exact("modest")
    assert story(site.run("modest")) == [(1, 0, "preemption"), (2, 1, "finished")]


def test_l10_what_a_person_cancels_stays_cancelled(site):
    """By Slurm's own command, and by ours, which asks for a checkpoint first."""
    for name in ("theirs", "ours"):
        site.hold(name)
    theirs, ours = site.submit("theirs"), site.submit("ours")
    site.wait_until_held("theirs", theirs)
    site.wait_until_held("ours", ours)
    site.cluster.command("scancel", theirs)
    site.call("cancel", site.run("ours").path)
    for name, job in (("theirs", theirs), ("ours", ours)):
        site.wait_for(job, "CANCELLED", "COMPLETED", "FAILED")
        fields = site.cluster.job(job)
        assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), (name, fields)
        assert site.status(name)[1] == "cancelled", name
    assert site.cluster.command("squeue", "--noheader") == ""


def test_l4_a_run_that_loses_a_node_ends_exactly_on_others(site):
    site.hold("lossy")
    job = site.submit("lossy")
    site.wait_until_held("lossy", job)
    _, lost = site.nodes_of(job)
    site.cluster.cut(lost, "link")
    site.wait_for(job, "PENDING")
    site.release("lossy")
    site.wait_for(job, "COMPLETED")
    assert lost not in site.nodes_of(job)
    site.assert_exact("lossy")
    first, *_, last = attempts(site.run("lossy"))
    assert (first.restart, last.restart, last.end_class) == (0, 1, "finished")


@pytest.mark.slow
def test_l5_a_run_with_a_range_of_nodes_goes_on_with_those_that_are_left(site):
    """Slurm starts it again with what there is; the global batch stays, with places of weight 0 on three ranks."""
    site.hold("elastic")
    job = site.submit("elastic", "cluster.nodes=4", "cluster.min_nodes=2", "cluster.nproc_per_node=1")
    site.wait_until_held("elastic", job)
    lost = site.nodes_of(job)[-1]
    site.cluster.cut(lost, "link")
    site.cluster.give_up(lost)
    site.wait_for(job, "PENDING")
    site.release("elastic")
    site.wait_for(job, "COMPLETED")
    assert len(site.nodes_of(job)) == 3
    assert lost not in site.nodes_of(job)
    run = site.run("elastic")
    assert [(attempt.nodes, attempt.restart) for attempt in attempts(run)] == [(4, 0), (3, 1)]
    assert stored_recipe(run).cluster.nodes == 4  # the next start may have all again
    whole = {step: loss for step, (loss, _) in losses(site.whole).items()}
    assert {step: loss for step, (loss, _) in losses(run).items()} == pytest.approx(whole, rel=1e-5)
    assert valid_checkpoints(run)[-1].step == STEPS


def test_l11_a_copy_on_a_node_that_was_cut_off_commits_nothing(site):
    """Its node keeps the file system but not the network: it trains on beside the one that Slurm started elsewhere."""
    site.hold("twin")  # both, the new one too
    job = site.submit("twin", "cluster.nodes=1", "cluster.nproc_per_node=4")
    site.wait_until_held("twin", job)
    (lost,) = site.nodes_of(job)
    site.cluster.cut(lost, "link")
    site.cluster.give_up(lost)
    site.wait_for(job, "PENDING")
    site.wait_for(job, "RUNNING")
    site.wait_until_held("twin", job, attempt=2)
    assert site.cluster.runs(lost, "slurmstepd")  # the old copy lives
    (new,) = site.nodes_of(job)
    site.hold("twin", node=new)
    site.release("twin")  # the old copy alone
    run = site.run("twin")
    ended = until("the old copy's end", lambda: read_outcomes(run, 1), timeout_s=400)
    assert "attempt 2 has started" in ended[0].message  # what its first commit met
    assert {checkpoint.attempt for checkpoint in valid_checkpoints(run) if checkpoint.step > 4} <= {2}
    site.release("twin", node=new)
    site.wait_for(job, "COMPLETED")
    site.assert_exact("twin")
    site.cluster.heal(lost)
    assert story(run) == [(1, 0, "node"), (2, 1, "finished")]
    assert valid_checkpoints(run)[-1].attempt == 2
    assert site.cluster.job(job)["JobState"] == "COMPLETED"
    assert site.cluster.job(job)["Restarts"] == "1"


def test_l10_a_users_mistake_is_not_tried_again_and_is_told(site):
    (site.folder / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "no end\n')
    job = site.submit("wrong", f"data.train=[{{path: {site.folder}/broken.jsonl}}]")
    site.wait_for(job, "FAILED")
    assert site.cluster.job(job)["Restarts"] == "0"
    told = site.call("status", site.run("wrong").path)
    assert "failed" in told
    assert "broken.jsonl" in told
    assert "stop" in site.call("status", site.run("wrong").path, "--history")


def test_a_sweep_is_an_array_whose_runs_come_back_one_by_one(site):
    """Only the warned one is requeued, though an array's elements share a number."""
    values = {f"sweep-lr-{value}": value for value in ("1e-2", "2e-2", "3e-2")}
    names = list(values)
    site.hold(names[1])
    site.call(
        "submit", site.recipe, "--sweep", "optimizer.lr=1e-2,2e-2,3e-2", "run.name=sweep", "cluster.nodes=1",
        "cluster.nproc_per_node=1", "train.max_steps=9",
    )  # fmt: skip
    jobs = {name: site.job_of(name) for name in names}
    site.wait_until_held(names[1], jobs[names[1]])
    site.cluster.command("scancel", "--batch", "--signal=USR1", jobs[names[1]])
    site.wait_for(jobs[names[1]], "PENDING", "REQUEUED")
    site.release(names[1])
    for name, job in jobs.items():
        fields = site.wait_for(job, "COMPLETED")
        assert fields["Restarts"] == ("1" if name == names[1] else "0")
        assert site.status(name) == ("finished", "finished")
        alone = f"optimizer.lr={values[name]}", "cluster.nproc_per_node=1", "train.max_steps=9"
        site.assert_exact(name, site.alone(f"alone-{values[name]}", *alone))
    assert len({tuple(losses(site.run(name)).values()) for name in names}) == 3


def test_l10_a_recipe_that_was_spoilt_after_it_was_checked_is_not_tried_again(site):
    """No attempt begins, and the nodes end each other; none of that may look like a death without a word."""
    site.call("render", site.recipe, "run.name=spoilt", "--target", "slurm", "-o", "spoilt")
    recipe = site.folder / "spoilt" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('"fsdp2"', '"fsdp3"'))
    job = site.shell("cd spoilt && sbatch --parsable job.sbatch")
    site.wait_for(job, "FAILED")
    assert site.cluster.job(job)["Restarts"] == "0"
    assert "strategy.kind = fsdp3" in (recipe.parent / f"slurm-{job}.out").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("cluster.nodes=9", "train.global_batch_size=18"), "cluster.nodes"),
        (("cluster.slurm.partition=nowhere",), "cluster.slurm.partition"),
        (("cluster.slurm.gres=gpu:3",), "cluster.slurm.gres = gpu:3"),
        (("cluster.slurm.reservation=nothing",), "cluster.slurm.reservation"),
        (("cluster.slurm.constraint=fast",), "cluster.slurm.constraint"),
        (("cluster.slurm.cpus_per_node=99",), "cluster.slurm.cpus_per_node"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_queued(site, changes, told):
    last = site.cluster.command("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    said = site.call("submit", site.recipe, "run.name=refused", *changes, code=2)
    assert told in said
    assert not site.run("refused").path.exists()
    assert site.cluster.command("squeue", "--noheader", "--format=%i") == last


def test_l4_one_task_a_rank_ends_like_one_agent_a_node(site):
    job = site.submit("tasks", "cluster.slurm.tasks=gpu")
    site.wait_for(job, "COMPLETED")
    site.assert_exact("tasks")


def test_l4_a_plain_srun_in_an_allocation_ends_like_all(site):
    """By the very line of docs/slurm.md."""
    page = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    (srun,) = re.findall(r"^    (srun .*)$", page, re.MULTILINE)
    site.shell(f"salloc --quiet --nodes=2 --ntasks-per-node=1 --cpus-per-task=32 {srun}")
    site.assert_exact("big")
    assert {(attempt.target, attempt.end_class) for attempt in attempts(site.run("big"))} == {("slurm", "finished")}


@pytest.mark.slow
def test_data_are_prepared_by_an_array_of_jobs_and_one_behind_it_as_by_one_process(site):
    source = f"data.train=[{{path: {in_files(site.folder, 3)}}}]"
    shared, alone = site.folder / "cache-shared", site.folder / "cache-alone"
    beyond = ("--target", "slurm", "-n", "2", "-o", str(site.folder / "prepare"), "--submit")
    said = site.call("prepare", site.recipe, source, f"data.cache_dir={shared}", *beyond)
    shards, merge = re.findall(r"slurm job (\d+)", said)
    site.wait_for(merge, "COMPLETED", "CANCELLED", "FAILED")
    assert site.cluster.job(merge)["JobState"] == "COMPLETED", site.cluster.account_of(merge)
    outputs = sorted((site.folder / "prepare").glob(f"shards-{shards}_*.out"))
    assert len(outputs) == 2
    assert "share 1 of 2 is tokenised" in outputs[1].read_text()
    site.call("prepare", site.recipe, source, f"data.cache_dir={alone}", "cluster.setup=[]")
    assert made_in(shared) == made_in(alone)
