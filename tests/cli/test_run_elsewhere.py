"""The same training by other starts: the rendered torchrun script, and workers on two nodes that are one machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run.ledger import attempts
from launcher.run.state import read_state
from tests.jobs.make import descendants, finish, launcher, losses, project, run_of, tensors_of, until
from tests.ranks import free_port

pytestmark = pytest.mark.gloo

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    made = project(tmp_path_factory.mktemp("project"))
    finish(launcher("run", made, "run.name=local"), code=0)
    return made


def test_the_rendered_torchrun_script_learns_the_same_losses_as_launcher_run(recipe, tmp_path):
    out, _ = finish(launcher("render", recipe, "run.name=rendered", "-o", tmp_path), code=0)
    assert out.splitlines()[-1] == "bash job.sh"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rendered, local = run_of(recipe, "rendered"), run_of(recipe, "local")
    assert losses(rendered) == losses(local)
    assert tensors_of(rendered.checkpoint(6, 1)) == tensors_of(local.checkpoint(6, 1))
    assert read_state(rendered).status == "finished"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A run for two nodes of one rank each, made as a rendered script makes it."""
    recipe = project(tmp_path_factory.mktemp("pair"), cluster={"nodes": 2, "nproc_per_node": 1})
    subprocess.run([sys.executable, "-m", "launcher.jobs.begin", str(recipe)], check=True, timeout=240)
    return recipe


def workers(recipe: Path, port: int, *ranks: int):
    options = ["--rendezvous", f"127.0.0.1:{port}"]
    return [launcher("worker", run_of(recipe).path, "--node-rank", str(rank), *options) for rank in ranks]


def set_steps(recipe: Path, steps: int) -> None:
    """Lengthen a run as its next start would."""
    run = run_of(recipe)
    values = run.read_recipe()
    values["train"]["max_steps"] = steps
    values["optimizer"]["schedule_steps"] = steps
    run.write_recipe(values)


def test_two_workers_train_together_and_node_0_alone_keeps_the_ledger(pair, recipe):
    for worker in workers(pair, free_port(), 1, 0):
        finish(worker, code=0)
    run = run_of(pair)
    assert [a.reason for a in attempts(run)] == ["by hand"]
    assert losses(run).keys() == losses(run_of(recipe, "local")).keys()
    logs = {file.name for file in (run.path / "logs" / "attempt-1").glob("*/*.log")}
    assert logs == {"0.log", "1.log", "agent-0.log", "agent-1.log"}
    for worker in workers(pair, free_port(), 0, 1):  # a finished run keeps no node waiting
        out, _ = finish(worker, code=0)
        assert "is finished" in out


def test_a_worker_alone_needs_no_options_and_learns_the_same(recipe):
    call = [sys.executable, "-m", "launcher.jobs.begin", str(recipe), "run.name=alone"]
    subprocess.run(call, check=True, timeout=240)
    run = run_of(recipe, "alone")
    assert run.read_json("plan.json")["total_steps"] == 6
    finish(launcher("worker", run.path), code=0)
    assert losses(run) == losses(run_of(recipe, "local"))


def test_a_worker_whose_peer_does_not_come_stops_when_it_is_asked_to(pair):
    set_steps(pair, 8)
    (waiting,) = workers(pair, free_port(), 1)
    until("it is on its way", lambda: list(descendants(waiting.pid)))
    waiting.terminate()
    out, _ = finish(waiting, code=75)
    assert "waiting for node 0" in out


def test_nodes_that_do_not_share_the_run_directory_are_refused_on_both_with_the_fix(pair, tmp_path):
    set_steps(pair, 8)
    shutil.copytree(run_of(pair).path, tmp_path / "copy")
    port = free_port()
    (leader,) = workers(pair, port, 0)
    options = ["--node-rank", "1", "--rendezvous", f"127.0.0.1:{port}"]
    for worker in (launcher("worker", tmp_path / "copy", *options), leader):
        _, err = finish(worker, code=2)
        assert "do not see the same directory" in err
        assert "Put run.dir on a file system that all nodes share" in err


@pytest.mark.parametrize(("host", "words"), [("127.0.0.1", "is taken on this machine"), ("", "expected HOST:PORT")])
def test_a_rendered_script_of_node_0_refuses_a_taken_port_before_anything_is_written(pair, tmp_path, host, words):
    finish(launcher("render", pair, f"run.dir={tmp_path}/runs", "-o", tmp_path / "job"), code=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "LAUNCHER_RENDEZVOUS": f"{host}:{port}"}
        done = subprocess.run(
            ["bash", "node-0.sh"], cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_taken_port_is_refused_with_code_2(pair):
    set_steps(pair, 8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, err = finish(workers(pair, port, 0)[0], code=2)
    assert f"port {port} is taken" in err
