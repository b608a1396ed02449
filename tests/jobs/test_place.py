"""Where a process stands in a job: options, LAUNCHER_* variables, Slurm, Kubeflow, Indexed Jobs; what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.errors import UserError
from launcher.jobs.place import Place, find_place, find_submission, first_host, port_of, settled, start_reason
from launcher.run.lease import Submission

IN_STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_NNODES": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[001-008]",
}  # fmt: skip
KUBEFLOW = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500"}


def place(environment=(), *, nodes=None, node_rank=None, rendezvous=None, command=False) -> Place:
    return find_place(
        nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, command=command, environment=dict(environment)
    )


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"), ("node1,node2", "node1"), ("gpu[007-012,020],login1", "gpu007"), ("a[3,5-7]", "a3"),
        ("rack[2-4]-gpu[01-16]", "rack2-gpu01"), ("n[1-2]-ib,n9", "n1-ib"), ("", ""),
    ],
)  # fmt: skip
def test_first_host_of_a_slurm_list(nodelist, first):
    assert first_host(nodelist) == first


def test_ports_lie_below_those_that_the_kernel_hands_out_and_differ_from_job_to_job():
    ports = {port_of(number) for number in range(100_000, 120_000)}
    assert len(ports) == 20_000
    assert (min(ports), max(ports)) == (10_000, 29_999)


def test_a_task_of_srun_finds_its_place_in_the_step():
    found = place(IN_STEP)
    assert (found.nodes, found.rank, found.rendezvous, found.source) == (2, 1, "gpu007:14711", "Slurm job 4711")
    assert settled(found, 2) == (1, "gpu007:14711")


def test_what_is_given_wins_over_what_slurm_says():
    found = place(IN_STEP, rendezvous="gpu007-ib:29400")
    assert (found.nodes, found.rank, found.rendezvous) == (2, 1, "gpu007-ib:29400")
    assert place(IN_STEP, nodes=1) == Place(nodes=1)


def test_kubeflow_and_indexed_jobs():
    found = place(KUBEFLOW)
    assert (found.nodes, found.rank, found.rendezvous) == (4, 3, "job-node-0-0.job:29500")
    found = place({"JOB_COMPLETION_INDEX": "2", "LAUNCHER_TARGET": "kubernetes"}, nodes=3, rendezvous="job-0.job:29400")
    assert (found.nodes, found.rank, found.rendezvous, found.names_may_come) == (3, 2, "job-0.job:29400", True)


def test_a_process_without_a_scheduler_knows_what_it_was_told():
    assert place() == Place()
    assert settled(place(), 1) == (0, None)
    assert settled(place(nodes=2, node_rank=1, rendezvous="a:1"), 2) == (1, "a:1")
    assert settled(place(nodes=1, node_rank=0), 1) == (0, None)
    alone = {**IN_STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    assert settled(place(alone), 1) == (0, None)


def test_a_command_that_starts_all_ranks_needs_one_process_and_no_meeting():
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}
    found = place(batch, command=True)
    assert (found.nodes, found.rank, found.rendezvous) == (4, 0, None)


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({}, {"rendezvous": "auto"}, ["--rendezvous auto", "SLURM_STEP_NODELIST", "PET_MASTER_ADDR", "LAUNCHER_NODES"]),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, {}, ["outside of srun", "srun --ntasks-per-node=1 launcher"]),
        ({**IN_STEP, "SLURM_STEP_NUM_TASKS": "16"}, {}, ["16 tasks on 2 nodes", "RUN -- srun", "one task per GPU"]),
        ({**KUBEFLOW, "PET_NNODES": "1:4"}, {}, ["PET_NNODES = 1:4", "expected one number of nodes"]),
        ({}, {"nodes": 0}, ["--nodes 0: expected 1 or more"]),
    ],
)  # fmt: skip
def test_environments_that_cannot_work_are_refused_in_words(environment, options, words):
    with pytest.raises(UserError) as refused:
        place(environment, **options)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("found", "nodes", "words"),
    [
        (Place(), 2, ["--node-rank: missing in a job of 2 nodes: expected 0 to 1", "Looked for LAUNCHER_NODES"]),
        (Place(rank=2, rendezvous="a:1"), 2, ["--node-rank 2: expected 0 to 1", "2 nodes"]),
        (Place(rank=-1, rendezvous="a:1"), 2, ["--node-rank -1: expected 0 to 1"]),
        (Place(nodes=1, rank=1), 1, ["--node-rank 1: expected 0 to 0", "1 node"]),
        (Place(rank=0), 1, ["--node-rank 0: expected --nodes 2 or more", "cluster.nodes = 1"]),
        (
            Place(rank=0, rendezvous="a:1"),
            1,
            ["--node-rank 0 --rendezvous a:1: expected --nodes 2 or more", "both out"],
        ),
        (Place(rendezvous="a:1"), 1, ["--rendezvous a:1: expected --nodes 2 or more"]),
        (Place(nodes=1, rank=0, rendezvous="a:1"), 1, ["--rendezvous a:1: expected --nodes 2 or more", "(--nodes 1)"]),
        (Place(rank=1), 2, ["--rendezvous: missing in a job of 2 nodes: expected HOST:PORT"]),
    ],
)
def test_places_that_cannot_be_are_refused_in_words(found, nodes, words):
    with pytest.raises(UserError) as refused:
        settled(found, nodes)
    for word in words:
        assert word in str(refused.value)


def test_which_start_of_which_job_this_is():
    given = {"LAUNCHER_TARGET": "ray", "LAUNCHER_JOB_ID": "raysubmit_1", "LAUNCHER_JOB_RESTART": "2"}
    assert find_submission(given) == Submission(target="ray", job_id="raysubmit_1", restart=2)
    assert find_submission({"SLURM_JOB_ID": "12"}) == Submission(target="slurm", job_id="12")
    array = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "3"}
    assert find_submission(array) == Submission(target="slurm", job_id="12_1", restart=3)
    assert find_submission({}) is None
    with pytest.raises(UserError, match="LAUNCHER_JOB_RESTART = twice: expected how often"):
        find_submission({"LAUNCHER_JOB_ID": "1", "LAUNCHER_JOB_RESTART": "twice"})


def test_launchers_own_variables_complete_what_options_leave_open():
    environment = {"LAUNCHER_NODES": "3", "LAUNCHER_NODE_RANK": "1", "LAUNCHER_RENDEZVOUS": "a:1"}
    assert place(environment, nodes=2) == Place(nodes=2, rank=1, rendezvous="a:1")
    assert place(environment, node_rank=0) == Place(nodes=3, rank=0, rendezvous="a:1")
    assert settled(place(environment, nodes=1), 1) == (0, None)
    with pytest.raises(UserError, match="LAUNCHER_NODES = two: expected a number"):
        place({"LAUNCHER_NODES": "two"})


@pytest.mark.parametrize(
    ("submission", "reason"),
    [
        (None, "by hand"),
        (Submission(target="ray", job_id="1"), "submitted"),
        (Submission(target="slurm", job_id="1", restart=2), "requeued"),
        (Submission(target="kubernetes", job_id="1", restart=1), "restarted"),
    ],
)
def test_the_ledger_says_in_a_persons_words_why_an_attempt_started(submission, reason):
    assert start_reason(submission) == reason


def test_finding_a_place_imports_no_torch():
    code = (
        "import launcher.jobs.place, launcher.jobs.network, launcher.jobs.meeting, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
