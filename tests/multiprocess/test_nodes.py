"""Several nodes by hand, each a network namespace: the same training as on one, stops, lost nodes, wrong options."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.run.control import read_verdict, stop_requested
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.jobs.make import finish, launcher, lives, losses, project, ranks_of, run_of, tensors_of, until
from tests.netns import Machines

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

STEPS = 200


@pytest.fixture(autouse=True)
def nothing_is_left(machines):
    yield
    machines.end()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe for two ranks, and its run `local` with both on one node."""
    made = project(
        tmp_path_factory.mktemp("nodes"), train={"max_steps": STEPS}, checkpoint={"every_steps": None}
    )  # fmt: skip
    finish(launcher("run", made, "run.name=local"), code=0)
    return made


@pytest.fixture(scope="module")
def pair(recipe) -> Path:
    """The same recipe for two nodes of one rank."""
    values = json.loads(recipe.read_text())
    values["cluster"] |= {"nodes": 2, "nproc_per_node": 1, "restart": {"no_progress": 9}}  # none writes a checkpoint
    file = recipe.with_name("pair.yaml")
    file.write_text(json.dumps(values))
    return file


def by_hand(machines: Machines, recipe: Path, name: str, *changes: str, ranks=(1, 0), port: int = 29400):
    """`launcher run` on each machine, node 0 last; the processes by node rank."""
    where = ["--nodes", 2, "--rendezvous", f"node0:{port}"]
    changes = (f"run.name={name}", "cluster.nproc_per_node=1", *changes)
    started = {i: machines.launcher(i, "run", recipe, "--node-rank", i, *where, *changes) for i in ranks}
    return [started[i] for i in sorted(started)]


def workers(machines: Machines, recipe: Path, name: str, *, restart: int = 0, port: int = 29400):
    """`launcher worker` on each machine as a scheduler starts it, the run being made from the recipe."""
    job = {"LAUNCHER_TARGET": "slurm", "LAUNCHER_JOB_ID": "4711", "LAUNCHER_JOB_RESTART": str(restart)}
    place = {"LAUNCHER_NODES": "2", "LAUNCHER_RENDEZVOUS": f"node0:{port}"}
    path = run_of(recipe, name).path
    return [
        machines.launcher(
            i, "worker", path, "--recipe", recipe, env={**job, **place, "LAUNCHER_NODE_RANK": str(i)}
        )
        for i in (0, 1)
    ]  # fmt: skip


def in_the_middle(recipe: Path, name: str, nodes):
    run = run_of(recipe, name)
    until("some steps", lambda: len(losses(run)) >= 3 or any(node.poll() is not None for node in nodes))
    assert all(node.poll() is None for node in nodes), [node.communicate() for node in nodes if node.poll() is not None]
    return run


def freeze(node) -> int:
    """Stop a node's only rank, so that no step is done until it is let go."""
    (rank,) = ranks_of(node.pid)
    os.kill(rank, signal.SIGSTOP)
    return rank


def test_l4_two_nodes_stopped_by_a_signal_on_node_1_go_on_as_workers_and_learn_what_one_node_learns(machines, recipe):
    nodes = by_hand(machines, recipe, "stopped")
    run = in_the_middle(recipe, "stopped", nodes)
    rank = freeze(nodes[0])
    nodes[1].terminate()
    until("the request", lambda: stop_requested(run))
    os.kill(rank, signal.SIGCONT)
    out, _ = finish(nodes[0], code=75)
    finish(nodes[1], code=75)
    assert f"node 0 of 2, node 0 at node0:29400; network interface eth0, address {machines.addresses[0]}" in out
    assert (read_state(run).status, read_verdict(run)) == ("preempted", "requeue")
    assert (attempts(run)[0].nodes, attempts(run)[0].target) == (2, "local")
    logs = {f"{file.parent.name}/{file.name}" for file in (run.path / "logs" / "attempt-1").glob("*/*.log")}
    assert logs == {"node0/0.log", "node0/agent-0.log", "node1/1.log", "node1/agent-1.log"}

    options = ["--nodes", 2, "--rendezvous", "node0:29401"]
    again = [machines.launcher(i, "worker", run.path, "--node-rank", i, *options) for i in (1, 0)]
    for node in again:
        finish(node, code=0)
    local = run_of(recipe, "local")
    assert losses(run) == losses(local)
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(local)[-1].path)


def test_fsdp2_on_two_nodes_of_two_ranks_learns_what_four_ranks_on_one_node_learn(machines, recipe):
    changes = ("strategy=fsdp2", "train.max_steps=4", "cluster.nproc_per_node=2")
    finish(launcher("run", recipe, "run.name=four", *changes[:2], "cluster.nproc_per_node=4"), code=0)
    for node in by_hand(machines, recipe, "two-by-two", *changes):
        finish(node, code=0)
    run, local = run_of(recipe, "two-by-two"), run_of(recipe, "four")
    assert run.read_json("plan.json")["world_size"] == 4
    assert losses(run) == losses(local)
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(local)[-1].path)


def test_a_killed_worker_ends_the_others_and_a_restart_of_the_job_goes_on(machines, recipe, pair):
    """Node 1's, then node 0's; the first start makes the run from the recipe, later ones know its own."""
    first = workers(machines, pair, "killed")
    run = in_the_middle(recipe, "killed", first)
    first[1].kill()
    out, _ = finish(first[0], code=75)
    assert "node 1 (node1) has gone without a word" in out
    assert (attempts(run)[0].end_class, read_verdict(run)) == ("node", "requeue")

    second = workers(machines, pair, "killed", restart=1)
    until("a rank of node 1", lambda: ranks_of(second[1].pid))
    freeze(second[1])  # so that they are still at it
    second[0].kill()
    finish(second[1], code=75)
    assert read_verdict(run) is None  # who would have written it is dead

    for node in workers(machines, pair, "killed", restart=2):
        finish(node, code=0)
    assert [(start.job_id, start.restart) for start in attempts(run)] == [("4711", 0), ("4711", 1), ("4711", 2)]
    assert losses(run) == losses(run_of(recipe, "local"))


def test_l11_a_restart_takes_over_from_a_live_copy_of_the_job_whose_late_checkpoint_is_void(machines, pair):
    """As when a scheduler gives a node up that is only cut off: all of the old copy lives on."""
    old = workers(machines, pair, "cut")
    run = in_the_middle(pair, "cut", old)
    ranks = [freeze(node) for node in old]
    new = workers(machines, pair, "cut", restart=1, port=29401)
    out, _ = finish(new[0], code=0)
    finish(new[1], code=0)
    assert "taken over, because this is start 1" in out
    before = [checkpoint.path for checkpoint in valid_checkpoints(run)]
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    for node in old:
        node.communicate(timeout=240)
        assert node.returncode != 0
    assert [checkpoint.path for checkpoint in valid_checkpoints(run)] == before
    assert (read_state(run).status, read_state(run).attempt) == ("finished", 2)
    assert not [rank for rank in ranks if lives(rank)]


def test_a_node_rank_given_twice_is_answered_on_all_nodes_with_both_names(machines, recipe):
    options = ["--nodes", 3, "--rendezvous", "node0:29400", "run.name=twice", "cluster.nproc_per_node=1"]
    options.append("train.global_batch_size=3")
    started = [(0, 0), (1, 1), (0, 1)]  # machine and node rank
    nodes = [machines.launcher(machine, "run", recipe, "--node-rank", rank, *options) for machine, rank in started]
    said = {finish(node, code=2)[1].splitlines()[-1] for node in nodes}
    assert len(said) == 1, said
    assert said & {
        f"--node-rank 1: given on {a} and on {b}: expected another number on each node."
        for a, b in (("node0", "node1"), ("node1", "node0"))
    }
    assert not run_of(recipe, "twice").path.exists()  # nothing was learnt: mended, it starts as a new run


def test_a_second_node_0_on_another_machine_is_answered_on_both(machines, recipe):
    (first,) = by_hand(machines, recipe, "two-zeros", ranks=(0,))
    until("the store", lambda: run_of(recipe, "two-zeros").ledger_file.exists() or first.poll() is not None)
    options = ["--nodes", 2, "--node-rank", 0, "--rendezvous", "node0:29400", "run.name=two-zeros"]
    second = machines.launcher(1, "run", recipe, *options, "cluster.nproc_per_node=1")
    for node in (second, first):
        assert "--node-rank 0: given on node0 and on node1: expected another number" in finish(node, code=2)[1]


@pytest.mark.parametrize(
    ("machine", "options", "words"),
    [
        (1, ["--node-rank", 0, "--rendezvous", "node0:29400"], "expected an address of this machine, because it is"),
        (0, ["--node-rank", 0, "--rendezvous", "node9:29400"], "expected a name or address of node 0 that node0 knows"),
        (1, ["--node-rank", 1, "--rendezvous", "192.0.2.1:29400"], "cannot reach it (Network is unreachable)"),
        (1, ["--node-rank", 1, "--rendezvous", "10.77.0.99:29400"], "node1 cannot reach 10.77.0.99 ("),
        (1, ["--node-rank", 2, "--rendezvous", "node0:29400"], "--node-rank 2: expected 0 to 1"),
        (1, ["--node-rank", 1, "--rendezvous", "node0"], "expected HOST:PORT on node 0"),
        (1, ["--node-rank", 1], "--rendezvous: missing in a job of 2 nodes: expected HOST:PORT"),
        (1, ["--rendezvous", "node0:29400"], "--node-rank: missing in a job of 2 nodes: expected 0 to 1"),
        (1, ["--rendezvous", "auto"], "--rendezvous auto: no scheduler's variables are here. Looked for LAUNCHER_"),
        (
            0,
            ["--node-rank", 0, "--rendezvous", "node0:29400", "cluster.network_interface=eht0"],
            "network_interface = eht0: expected an interface of node0 that has an address: lo (127.0.0.1), eth0",
        ),
    ],
)  # fmt: skip
def test_wrong_places_are_answered_in_words_before_anything_is_written(machines, recipe, machine, options, words):
    node = machines.launcher(machine, "run", recipe, "--nodes", 2, "run.name=wrong", *options)
    _, err = finish(node, code=2)
    assert words in err
    assert "Traceback" not in err
    assert not run_of(recipe, "wrong").path.exists()


def test_a_node_that_lacks_something_ends_the_wait_of_the_others_with_its_words(machines, recipe):
    options = ["--nodes", 2, "--rendezvous", "node0:29400", "run.name=lacking", "cluster.env=[SECRET]"]
    nodes = [
        machines.launcher(i, "run", recipe, "--node-rank", i, *options, "cluster.nproc_per_node=1", env=environment)
        for i, environment in ((0, {"SECRET": "x"}), (1, {}))
    ]
    for node in nodes:
        _, err = finish(node, code=2)
        assert "cluster.env: SECRET not set in the environment" in err
