"""Several nodes whose attempts are restarted in place, with as many, fewer or more nodes; each a network namespace."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.run.control import read_verdict
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests import netns
from tests.jobs.make import finish, launcher, losses, project, ranks_of, run_of, tensors_of, until
from tests.slurm.make import last_step

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

STEPS = 12
HELD = 5  # no multiple of `checkpoint.every_steps`
HOLD = Path(__file__).parents[1] / "slurm" / "hold"
THREE = ("cluster.nodes=3", "cluster.min_nodes=2", "train.global_batch_size=3")


@pytest.fixture(scope="module")
def machines():
    netns.require()
    with netns.Machines(3) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(machines):
    yield
    machines.end()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe for nodes of one rank that rows of three divide among; what holds a run lies beside it."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "hold").mkdir()
    return project(
        folder,
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 2},
        cluster={"nproc_per_node": 1, "accelerator": "cpu", "preflight": False, "join_timeout_s": 240},
    )


def start(machines, recipe: Path, node: int, name: str, *changes: str, nodes: int, port: int):
    """`launcher run` on one machine, as a person types it there."""
    where = ["--nodes", nodes, "--node-rank", node, "--rendezvous", f"node0:{port}"]
    env = {"PYTHONPATH": str(HOLD)}
    return machines.launcher(node, "run", recipe, *where, f"run.name={name}", *changes, env=env)


def hold(recipe: Path, name: str) -> Path:
    """Each attempt of a run stops short at step `HELD` of its own, until the file has gone or it is asked to stop."""
    file = recipe.parent / "hold" / name
    file.write_text(str(HELD))
    return file


def wait_until_held(run: RunDirectory, attempt: int, nodes) -> None:
    """Figures are written up to two steps late."""

    def there() -> bool:
        gone = [node for node in nodes if node.poll() is not None]
        assert not gone, [node.communicate() for node in gone]
        return len(attempts(run)) == attempt and _looked(run, attempt) >= HELD - 2

    until(f"attempt {attempt} at its step {HELD}", there, timeout_s=240)


def _looked(run: RunDirectory, attempt: int) -> int:
    """Steps that an attempt has made."""
    first = max((int(name[5:13]) for name in attempts(run)[-1].accepts), default=0)
    return last_step(run, attempt) - first


def story(run: RunDirectory) -> list[tuple[object, str | None, bool]]:
    """Of each attempt: its nodes, the class of its end, whether the launcher itself made it behind the one before."""
    return [(attempt.nodes, attempt.end_class, attempt.within) for attempt in attempts(run)]


def assert_as_uninterrupted(recipe: Path, name: str, *changes: str, ranks: int) -> None:
    """Every step once, with the rows and the loss of a run that nothing happened to."""
    run, whole = run_of(recipe, name), run_of(recipe, "whole")
    if not whole.exists():
        finish(launcher("run", recipe, "run.name=whole", f"cluster.nproc_per_node={ranks}", *changes), code=0)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert {step: loss for step, (loss, _) in losses(run).items()} == pytest.approx(
        {step: loss for step, (loss, _) in losses(whole).items()}, rel=1e-5
    )
    assert tokens(run) == tokens(whole)
    assert valid_checkpoints(run)[-1].step == STEPS


def tokens(run: RunDirectory) -> dict[int, int]:
    """Trained tokens of each step, the last line of a step counting: other rows have other numbers."""
    lines = map(json.loads, run.metrics_file.read_text().splitlines())
    return {line["step"]: line["tokens"] for line in lines if "loss" in line}


def test_a_killed_rank_restarts_the_attempt_on_both_nodes_in_place(machines, recipe):
    file = hold(recipe, "pair")
    nodes = [start(machines, recipe, i, "pair", nodes=2, port=29500) for i in (0, 1)]
    run = run_of(recipe, "pair")
    wait_until_held(run, 1, nodes)
    (rank,) = ranks_of(nodes[1].pid)
    os.kill(rank, signal.SIGKILL)
    wait_until_held(run, 2, nodes)  # the same processes on both nodes
    assert read_verdict(run) is None  # it goes on: nobody else is to start it
    file.unlink()
    for node in nodes:
        finish(node, code=0)
    assert [(end, within) for _, end, within in story(run)] == [("unknown", False), ("finished", True)]
    whole = run_of(recipe, "pair-whole")
    finish(launcher("run", recipe, "run.name=pair-whole", "cluster.nproc_per_node=2"), code=0)
    assert losses(run) == losses(whole)
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)


def test_a_lost_node_shrinks_the_run_and_a_returning_one_grows_it_at_a_checkpoint(machines, recipe):
    """On two nodes a step's three rows leave one slot of weight 0. Node 2 goes without a word, and is started again."""
    file = hold(recipe, "elastic")
    nodes = [start(machines, recipe, i, "elastic", *THREE, nodes=3, port=29510) for i in range(3)]
    run = run_of(recipe, "elastic")
    wait_until_held(run, 1, nodes)
    nodes[2].kill()
    wait_until_held(run, 2, nodes[:2])
    before = valid_checkpoints(run)[-1].step
    nodes[2] = start(machines, recipe, 2, "elastic", *THREE, nodes=3, port=29510)
    until("node 2 is taken in", lambda: len(attempts(run)) == 3, timeout_s=240)
    taken_in_at = max(int(name[5:13]) for name in attempts(run)[-1].accepts)
    assert before < taken_in_at < STEPS  # a checkpoint that was asked for
    file.unlink()
    said = [finish(node, code=0)[0] for node in nodes]
    three, two = ["node0", "node1", "node2"], ["node0", "node1"]
    assert story(run) == [(three, "node", False), (two, "resize", True), (three, "finished", True)]
    assert "2 of 3 nodes take part (node0, node1): 2 ranks; 1 slot of each step of weight 0" in said[0]
    assert "node 2 (node2) waits to take part" in said[0]
    assert read_state(run).status == "finished"
    assert_as_uninterrupted(recipe, "elastic", "train.global_batch_size=3", ranks=3)


@pytest.mark.matrix
def test_a_node_that_is_cut_off_is_left_out_after_a_minute_and_taken_in_again(machines, recipe):
    """Nobody is told of a cable that is pulled: heartbeats that stand still for 60 s are what tells, on both sides."""
    file = hold(recipe, "cut")
    nodes = [start(machines, recipe, i, "cut", *THREE, nodes=3, port=29520) for i in range(3)]
    run = run_of(recipe, "cut")
    wait_until_held(run, 1, nodes)
    machines.cable(2, plugged=False)
    out, _ = finish(nodes[2], code=1)
    assert "node 0 (node0) is lost: nothing was heard of it for 60 s" in out
    assert "start it again, and it is taken in at a checkpoint" in out
    wait_until_held(run, 2, nodes[:2])
    machines.cable(2, plugged=True)
    nodes[2] = start(machines, recipe, 2, "cut", *THREE, nodes=3, port=29520)
    until("node 2 is taken in", lambda: len(attempts(run)) == 3, timeout_s=240)
    file.unlink()
    for node in nodes:
        finish(node, code=0)
    assert [end for _, end, _ in story(run)] == ["node", "resize", "finished"]
    assert_as_uninterrupted(recipe, "cut", "train.global_batch_size=3", ranks=3)


@pytest.mark.matrix
def test_without_node_0_the_others_end_and_all_are_started_again(machines, recipe):
    """The run begins without node 2, which never comes; node 0 is killed, and what it held together ends."""
    file = hold(recipe, "headless")
    nodes = [start(machines, recipe, i, "headless", *THREE, nodes=3, port=29530) for i in range(2)]
    run = run_of(recipe, "headless")
    wait_until_held(run, 1, nodes)
    assert attempts(run)[0].nodes == ["node0", "node1"]
    nodes[0].kill()
    finish(nodes[1], code=1)
    file.unlink()
    for node in [start(machines, recipe, i, "headless", *THREE, nodes=3, port=29531) for i in range(3)]:
        finish(node, code=0)
    assert [(nodes, end) for nodes, end, _ in story(run)] == [
        (["node0", "node1"], None), (["node0", "node1", "node2"], "finished"),
    ]  # fmt: skip
    assert_as_uninterrupted(recipe, "headless", "train.global_batch_size=3", ranks=3)
