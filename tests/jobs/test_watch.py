"""When the watch calls a rank hung, and which one: clocks, limits and evidence, without training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.jobs import evidence as evidence_of
from launcher.jobs import scratch, watch
from launcher.jobs.evidence import Evidence, find_culprit, tracer_of
from launcher.jobs.watch import FLOOR_S, LONG_S, TIMES, Watch
from launcher.recipe.schema.cluster import Cluster
from launcher.run.control import read_outcomes
from launcher.run.files import read_lines
from launcher.run.heartbeat import PHASES, Heart
from tests.jobs.make import until
from tests.run.make import make_run, start

FORWARD, SAVE = PHASES.index("forward"), PHASES.index("save")
RANK = """
import os, sys, time
from launcher.trainer import beat
os.environ["LAUNCHER_HEARTBEAT"] = sys.argv[1]
beat.begin(int(sys.argv[2]))
for step in range(4):
    beat.beat("forward", step)
def stand_still():
    print("stands", flush=True)
    while True:
        time.sleep(3600)
stand_still()
"""


class Clock:
    """Monotonic time as the watch sees it, which this test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)


def make_watch(folder: Path, *, ranks: int = 1, **cluster: object) -> tuple[Watch, list[str]]:
    run, said = make_run(folder), list[str]()
    attempt = start(run)
    made = Watch(run, Cluster(**cluster), attempt, node="here", ranks=ranks, say=said.append)  # type: ignore[arg-type]
    return made, said


def pass_time(made: Watch, clock: Clock, seconds: float, *, every: float = 0.5) -> bool:
    """Whether the rank was over its limit at some look."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += every
        made.look()
        if (hindmost := made._hindmost()) is not None and hindmost[1] >= 0:
            return True
    return False


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """A watch with a rank of ours that has made four steps, and the clock."""
    made, said = make_watch(tmp_path, hang_timeout_s="auto")
    monkeypatch.setattr(made, "_lead", lambda heard: None)  # how the attempt ends is another test's
    clock = Clock(monkeypatch)
    made._last = clock.now
    heart = Heart(scratch.folder() / "watch", 0)
    made.look()
    for step in range(4):
        heart.beat(FORWARD, step)
        clock.now += 0.1
        made.look()
    return made, heart, clock, said


def test_auto_waits_five_minutes_or_ten_times_the_slowest_recent_step(rank):
    made, heart, clock, _ = rank
    assert not pass_time(made, clock, FLOOR_S - 1)
    heart.beat(FORWARD, 4)  # that step took nearly the floor
    made.look()
    assert not pass_time(made, clock, TIMES * (FLOOR_S - 1) - 60, every=0.9)
    assert pass_time(made, clock, 120)


def test_a_save_has_half_an_hour(rank):
    made, heart, clock, _ = rank
    heart.beat(SAVE, 4)
    made.look()
    assert not pass_time(made, clock, LONG_S - 1, every=0.9)
    assert pass_time(made, clock, 2)


def test_a_suspended_machine_or_a_stopped_launcher_is_no_hang(rank):
    made, _, clock, _ = rank
    for _ in range(20):
        clock.now += 8 * 3600
        assert not pass_time(made, clock, 1)


def test_a_debugger_is_told_from_nobody():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert tracer_of(process.pid) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_stopped_one_of_two_standing_ranks_is_named_its_outcome_written_and_its_stack_had(tmp_path, monkeypatch):
    for wait in ("ANSWER_S", "_WOKEN_S"):
        monkeypatch.setattr(evidence_of, wait, 60.0)  # however busy this machine is
    made, _ = make_watch(tmp_path, ranks=2, hang_timeout_s=2)
    folder = str(scratch.folder() / "watch")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, folder, str(i)], stdout=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "stands\n"
        made.look()
        for one in made._ranks.values():
            one.first_step = 0
        ranks[1].send_signal(signal.SIGSTOP)
        ending = until("a hang", made.look)
        assert (ending.failure_class, ending.rank, ending.step, ending.node) == ("hang", 1, 3, "here")
        assert "its process is stopped" in ending.message
        assert "stand_still" in ending.message
        run = made._run
        assert read_outcomes(run, 1)[1].failure_class == "hang"
        (line,) = read_lines(run.watch_file)
        assert (line["kind"], line["rank"], line["phase"]) == ("hang", 1, "forward")
        for number in (0, 1):
            assert "stand_still" in (run.logs(1, "here") / f"{number}.stack.txt").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def evidence(rank: int, **changes: object) -> Evidence:
    usual = Evidence(
        rank=rank, node="here", pid=1, step=7, phase="report", still_s=9.0, state="S",
        stack=["all_reduce (torch/distributed/distributed_c10d.py:1)"], waits=True, collectives=[collective(12)],
    )  # fmt: skip
    return replace(usual, **changes)  # type: ignore[arg-type]


def collective(number: int, *, done: bool = False) -> dict[str, object]:
    return {"group": "0", "number": number, "name": "gloo:all_reduce", "sizes": [[4]], "done": done}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": "T"}, "is stopped"),
        ({"state": "D", "kernel": "nfs_wait"}, "nfs_wait"),
        ({"collectives": [collective(11, done=True)]}, "not come to gloo:all_reduce 12 of 4 elements"),
        ({"collectives": None}, "Python's lock"),
        ({"step": 6}, "further on"),
        ({"phase": "data"}, "further on"),
        ({"stack": ["read (user.py:3)"], "waits": False}, "in no collective"),
    ],
)
def test_the_culprit_is_the_rank_that_the_others_wait_for(changes, why):
    found = [evidence(0), evidence(1, **changes), evidence(2)]
    culprit, said = find_culprit(found)
    assert culprit is found[1]
    assert why in said


def test_nobody_is_named_where_all_stand_alike():
    assert find_culprit([evidence(0), evidence(1)]) == (None, "no rank stands out")


def test_what_nodes_tell_is_json(tmp_path):
    made, _ = make_watch(tmp_path, hang_timeout_s=None)
    Heart(scratch.folder() / "watch", 0)
    made.look()
    hindmost = made._hindmost()
    assert hindmost is not None
    assert json.loads(json.dumps(hindmost)) == [list(hindmost[0]), hindmost[1]]
