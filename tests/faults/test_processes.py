"""Faults of processes: signals, errors on one rank, ranks that never start, a dead launcher, two at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.run.control import read_verdict
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests import netns
from tests.faults.inside import Inside
from tests.jobs.make import descendants, finish, launcher, lives, losses, project, ranks_of, run_of, tensors_of, until

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

STEPS = 120
GONE_S = 10.0
SOON_S = 60.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(
        tmp_path_factory.mktemp("project"),
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 10, "async_save": True, "rehearse": False},
        cluster={"nproc_per_node": 2, "restart": {"backoff_s": 0}},
    )


@pytest.fixture(scope="module")
def whole(recipe: Path) -> RunDirectory:
    """The uninterrupted run."""
    finish(launcher("run", recipe, "run.name=whole"), code=0, timeout_s=600)
    return run_of(recipe, "whole")


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path)


_started: list[subprocess.Popen[str]] = []


def start(*arguments: str | Path, **more: Any) -> subprocess.Popen[str]:
    """`launcher` with these arguments; what a test that fails leaves is ended after it."""
    _started.append(launcher(*arguments, **more))
    return _started[-1]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    _started.clear()


class Started:
    """A launcher in the middle of a run's steps."""

    def __init__(self, recipe: Path, name: str, *changes: str, steps: int = 3, **more: Any) -> None:
        self.run = run_of(recipe, name)
        begun = len(losses(self.run))
        self.process = start("run", recipe, f"run.name={name}", *changes, **more)
        going = lambda: len(losses(self.run)) >= begun + steps or self.process.poll() is not None  # noqa: E731
        until("some steps", going, timeout_s=600)
        assert self.process.poll() is None, self.process.communicate()
        self.ranks, self.below = ranks_of(self.process.pid), descendants(self.process.pid)
        assert len(self.ranks) == 2

    @property
    def server(self) -> int:
        """The fork server: the parent of the ranks."""
        return int(Path(f"/proc/{self.ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])


def nothing_lives(pids: list[int], *, timeout_s: float = GONE_S) -> None:
    until("all processes gone", lambda: not [pid for pid in pids if lives(pid)], timeout_s=timeout_s)


def exactly_as(run: RunDirectory, whole: RunDirectory) -> None:
    """Losses, gradient norms, weights and moments equal bit by bit, each step made."""
    assert losses(run) == losses(whole)
    assert len(losses(run)) == STEPS
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(whole)[-1].path)


def test_F13_sigterm_twice_and_sigterm_with_sigkill_after_5_s_lose_no_more_than_one_interval(recipe, whole):
    """F13: a second SIGTERM changes nothing: the run stops with a durable checkpoint. Where a rank cannot stop, SIGKILL
    after 5 s leaves the newest whole checkpoint. Either way the next start goes on bit-exactly."""
    first = Started(recipe, "f13")
    first.process.terminate()
    first.process.terminate()
    out, _ = finish(first.process, code=75)
    assert out.count("SIGTERM: the run stops after a checkpoint") == 1
    assert (attempts(first.run)[-1].end_class, read_verdict(first.run)) == ("preemption", "requeue")
    newest = valid_checkpoints(first.run)[-1].step
    assert newest == read_state(first.run).step

    second = Started(recipe, "f13")
    os.kill(second.ranks[1], signal.SIGSTOP)  # it cannot take part in the stop
    second.process.terminate()
    time.sleep(5)
    assert second.process.poll() is None
    os.killpg(second.process.pid, signal.SIGKILL)
    second.process.communicate()
    nothing_lives(second.below)
    assert valid_checkpoints(first.run)[-1].step >= newest

    finish(start("run", recipe, "run.name=f13"), code=0)
    exactly_as(first.run, whole)


def test_F15_a_rank_that_raises_ends_all_ranks_is_named_and_its_class_decides(recipe, inside):
    """F15: one rank raises a Python error, later one runs out of memory: every rank ends within 10 s, the first failing
    rank is named with node, step and traceback in console, ledger and `status`; the first error is restarted within its
    budget, the second ends the run; no process is left."""
    started = Started(recipe, "f15", "train.max_steps=1000000", env=inside.environment)
    run = started.run
    inside.raise_in(1, after=5, error="python")
    until("the second attempt", lambda: len(attempts(run)) == 2)
    nothing_lives(started.ranks)
    first = attempts(run)[0].end_first
    assert first is not None
    assert first.time is not None
    assert (first.rank, first.failure_class, first.message) == (1, "unknown", "ValueError: a bug of rank 1")
    assert first.node == socket.gethostname()
    assert "ValueError: a bug of rank 1" in first.traceback
    assert first.step is not None
    assert first.step >= 4  # its fifth update was not finished
    assert attempts(run)[0].end_time is not None
    assert attempts(run)[0].end_time - first.time < GONE_S

    inside.raise_in(0, after=2, error="memory")
    out, err = finish(started.process, code=1)
    nothing_lives([*started.below, *ranks_of(started.process.pid)])
    assert "by rank 1 on" in out
    assert "ValueError: a bug of rank 1" in out
    assert "unknown: restart 1 of 3 (cluster.restart.unknown): attempt 2 begins now" in out
    assert "verdict: stop (out_of_memory: cluster.restart.out_of_memory allows 0 restarts)" in out, err
    shown, _ = finish(start("status", run.path, "--json"), code=0)
    failure = json.loads(shown)["failure"]
    assert (failure["rank"], failure["class"]) == (0, "out_of_memory")
    assert "DefaultCPUAllocator" in failure["message"]
    assert "<fault>" in failure["traceback"]
    text, _ = finish(start("status", run.path), code=0)
    assert "attempt 1 went on by itself after rank 1 on" in text
    assert "first failure: rank 0 on" in text


def test_F18_what_never_starts_is_an_error_in_words_within_a_minute(recipe):
    """F18: the process that starts the ranks stands still, the rendezvous' port is busy, its name is unknown: each is
    said in words in less than a minute, and nothing hangs."""
    changes = ["run.name=f18", "cluster.restart.hang=0"]
    process = start("run", recipe, *changes)
    server = until("the fork server", lambda: _server_of(process.pid))
    os.kill(server, signal.SIGSTOP)
    begun = time.monotonic()
    run = run_of(recipe, "f18")
    out, _ = finish(process, code=1, timeout_s=SOON_S)
    assert "failed (hang): the process that starts the ranks" in out or "no data" in out, out
    assert time.monotonic() - begun < SOON_S
    assert not lives(server)
    assert (attempts(run)[-1].end_class, read_state(run).status) == ("hang", "failed")

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        place = ["--nodes", 2, "--node-rank", 0, "run.name=f18-busy"]
        begun = time.monotonic()
        _, err = finish(start("run", recipe, *place, "--rendezvous", f"127.0.0.1:{port}"), code=2, timeout_s=SOON_S)
        assert f"{port}" in err
        assert "Traceback" not in err
        _, err = finish(
            start("run", recipe, *place, "--rendezvous", "no-such-host.invalid:29400"), code=2, timeout_s=SOON_S
        )
        assert "no-such-host.invalid" in err
        assert "Traceback" not in err
        assert time.monotonic() - begun < SOON_S
    assert not run_of(recipe, "f18-busy").exists()


def _server_of(parent: int) -> int | None:
    for pid in descendants(parent):
        try:
            if b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return None


def test_F19_no_process_outlives_a_killed_launcher_whatever_its_ranks_do(recipe, whole):
    """F19: the launcher is killed in the middle of a step while one of its ranks is stopped: ten seconds later nothing
    of it lives, and the next start takes the run over at once and goes on bit-exactly. Before that the fork server and
    the resource tracker are killed: the launcher notices, starts new ones, and the run goes on by itself."""
    started = Started(recipe, "f19", "cluster.restart.unknown=9")
    run = started.run
    tracker = next(pid for pid in started.below if pid not in (*started.ranks, started.server))
    os.kill(tracker, signal.SIGKILL)
    os.kill(started.server, signal.SIGKILL)
    nothing_lives([*started.ranks, started.server, tracker])
    steps = len(losses(run))
    until("steps of another attempt", lambda: len(losses(run)) >= steps + 3 or started.process.poll() is not None)
    assert started.process.poll() is None, started.process.communicate()
    assert attempts(run)[1].within

    below = descendants(started.process.pid)
    os.kill(ranks_of(started.process.pid)[0], signal.SIGSTOP)
    started.process.kill()
    started.process.communicate()
    nothing_lives(below)
    assert read_verdict(run) is None

    out, _ = finish(start("run", recipe, "run.name=f19"), code=0)
    assert "watching" not in out
    exactly_as(run, whole)


def test_F19_a_launcher_killed_in_a_pause_while_preparing_or_while_a_rank_is_being_forked_leaves_nothing(
    recipe, inside, tmp_path
):
    """F19: the launcher is killed while it waits to start again, while a child prepares the data, and between the fork
    of a rank and its first line of code, where the rank has not yet asked to die with its parent."""
    changes = ["checkpoint.every_steps=null", "train.max_steps=1000000", "cluster.restart.backoff_s=300"]
    started = Started(recipe, "f19-pause", *changes)
    os.kill(started.ranks[0], signal.SIGKILL)
    until("the pause", lambda: attempts(started.run)[-1].end_again or started.process.poll() is not None)
    below = descendants(started.process.pid)
    started.process.kill()
    started.process.communicate()
    nothing_lives([*below, *started.below])
    assert (len(attempts(started.run)), read_verdict(started.run)) == (1, None)
    first = attempts(started.run)[0].end_first
    assert first is not None
    assert first.step is not None  # of a rank that could not say it
    assert (first.rank, first.node, first.step >= 3) == (0, socket.gethostname(), True)
    assert first.message.startswith("rank 0 said nothing before its end: killed by SIGKILL (")

    cache = tmp_path / "cache"
    process = start("run", recipe, "run.name=f19-prepare", f"data.cache_dir={cache}")
    until("the preparing", lambda: cache.exists() or process.poll() is not None)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    nothing_lives(below)

    inside.hold_children()
    process = start("run", recipe, "run.name=f19-pause", *changes, env=inside.environment)
    held = until("a rank that has not begun", lambda: inside.held() or process.poll() is not None)
    below = descendants(process.pid)
    assert set(held) <= set(below)
    server = _server_of(process.pid)
    assert server is not None
    process.kill()
    process.wait()  # its pipes are still held
    nothing_lives([server])
    inside.let_go()
    nothing_lives([*below, *inside.held()])


@pytest.fixture(scope="module")
def machines() -> Iterator[netns.Machines]:
    netns.require()
    with netns.Machines(2) as made:
        yield made


def test_F20_a_second_launcher_from_another_machine_is_refused_and_takes_over_when_the_first_is_dead(
    recipe, whole, machines
):
    """F20: two machines (each a network and a host name of its own) start one run directory: the second is refused and
    told who has it; when the first is killed, the second takes its stale lease over at once and goes on bit-exactly."""
    first = machines.launcher(0, "run", recipe, "run.name=f20")
    run = run_of(recipe, "f20")
    until("some steps", lambda: len(losses(run)) >= 3 or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    _, err = finish(machines.launcher(1, "run", recipe, "run.name=f20"), code=2)
    assert "is being trained already: host node0" in err
    assert "Traceback" not in err
    below = descendants(first.pid)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    nothing_lives(below)
    out, _ = finish(machines.launcher(1, "run", recipe, "run.name=f20"), code=0)
    assert "watching" not in out  # the lock of a dead owner is free: nothing is waited for
    assert [attempt.host for attempt in attempts(run)] == ["node0", "node1"]
    exactly_as(run, whole)


def test_F20_of_two_launchers_started_at_once_one_trains(recipe, whole):
    """F20: two launchers are started at the same moment in one run directory: one trains as if alone, the other is
    refused in words."""
    processes = [start("run", recipe, "run.name=f20-twice") for _ in range(2)]
    said: list[tuple[int, str]] = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        said.append((process.returncode, out + err))
    assert sorted(code for code, _ in said) == [0, 2], said
    refused = next(text for code, text in said if code == 2)
    assert "is being trained already" in refused or "is locked by a process that has not signed" in refused
    run = run_of(recipe, "f20-twice")
    assert len(attempts(run)) == 1
    exactly_as(run, whole)
