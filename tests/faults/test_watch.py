"""F16, F17: ranks that stand still or are slow are named by the watch; a hang ends the attempt and the run goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import EXIT_PREEMPTED
from launcher.jobs import scratch, warm
from launcher.jobs.agent import RankProcess
from launcher.jobs.console import Console
from launcher.jobs.stragglers import GROUPS, stragglers
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.run.control import request_stop
from launcher.run.directory import RunDirectory
from launcher.run.files import read_lines
from launcher.run.heartbeat import Pace, Pulse
from launcher.run.ledger import attempts
from launcher.trainer import preload
from tests.faults import hanging
from tests.jobs.make import MODEL, losses, project, run_of, until

TIMEOUT_S = 8
STEPS = 30
NORMAL_STEPS, WITHIN = 1000, 50
SHARE_S = 0.0005  # for which a slowed rank is stopped, and then runs; shorter than the forward that is timed
WAYS = {2: "lock", 3: "sleep", 4: "data"}  # the first attempt hangs by a signal


@pytest.fixture(scope="module")
def hangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fork server whose ranks can be made to hang; the file that says how."""
    file = tmp_path_factory.mktemp("hangs") / "ways.json"
    file.write_text("{}")
    name = hanging.__name__
    preload.MODULES.append(name)
    os.environ[hanging.FILE] = str(file)
    warm.start()
    warm.renew("ddp", "cpu")
    yield file
    del os.environ[hanging.FILE]
    preload.MODULES.remove(name)
    warm.renew("ddp", "cpu")


class Meddler:
    """Does something to the ranks of a launch that runs in this thread, from another one."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act, self.failed = act, list[BaseException]()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Meddler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=60)
        assert not self.failed, self.failed

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self.failed.append(error)


def trained(recipe: Path, *changes: str) -> tuple[int, str]:
    """A `launcher run` in this process; its exit code and what it said."""
    said = io.StringIO()
    code = launch(load(recipe, list(changes)).recipe, force=False, console=Console(said))
    return code, said.getvalue()


def pid_of(rank: int, first: int) -> int:
    """The process of a rank, of those started since there were `first`."""
    (pid,) = {process.pid for process in RankProcess.started[first : first + 2] if process.local_rank == rank}
    assert pid is not None
    return pid


def ahead_of_others(pid: int, *, nice: int = -15) -> None:
    """Let all ranks, in the session of this one, compute before other tests do: one that has to wait is slow."""
    with contextlib.suppress(OSError):  # needs root, and a kernel that groups by session
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def steps_done(run: RunDirectory) -> int:
    return max(losses(run), default=0)


def watched(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.watch_file) if line["kind"] == kind]


@pytest.mark.gloo
@pytest.mark.slow
def test_F16_a_rank_that_hangs_is_named_with_step_and_collective_and_the_run_goes_on_by_itself(tmp_path, hangs):
    """F16: one rank hangs (SIGSTOP; Python's lock held by C code; asleep in Python; while its rows are read). The
    watch finds it within the time-out, names rank, node, step and what the others wait in, leaves all stacks, and
    the run goes on from its last checkpoint to the end."""
    recipe = project(
        tmp_path,
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 1},
        cluster={"hang_timeout_s": TIMEOUT_S, "restart": {"hang": 4, "no_progress": 9, "backoff_s": 0.1}},
    )
    run = run_of(recipe)
    hangs.write_text(json.dumps(WAYS))
    first = len(RankProcess.started)

    def stop_rank_1() -> None:
        until("three steps", lambda: steps_done(run) >= 3)
        os.kill(pid_of(1, first), signal.SIGSTOP)

    with Meddler(stop_rank_1):
        code, said = trained(recipe)
    assert code == 0, said
    assert set(losses(run)) == set(range(1, STEPS + 1))
    known = attempts(run)
    assert [attempt.end_class for attempt in known] == ["hang"] * 4 + ["finished"], said
    found = watched(run, "hang")
    assert [line["rank"] for line in found] == [1] * 4, found
    for attempt, line in zip(known, found, strict=False):
        assert attempt.end_first is not None
        assert attempt.end_first.rank == 1
        assert f"rank 1 on {line['node']} has not moved" in attempt.end_first.message
        assert f"at step {line['ranks']['1'][1]} in" in attempt.end_first.message
        assert TIMEOUT_S - 1 <= line["ranks"]["1"][3] < 3 * TIMEOUT_S, line
    for line in found[1:]:  # the first may be stopped where nobody waits in a collective
        assert "gloo:" in line["awaited"]

    def stack(attempt: int, rank: int) -> str:
        return (run.logs(attempt, found[0]["node"]) / f"{rank}.stack.txt").read_text()

    assert "its process is stopped" in known[0].end_first.message
    assert "let go on" in stack(1, 1)
    assert "Python's lock" in known[1].end_first.message
    assert "hold_the_lock" in known[1].end_first.message
    assert "sleep_in_python" in known[2].end_first.message
    assert "sleep_in_python" in stack(3, 1)
    assert "in data" in known[3].end_first.message
    assert "wait_for_a_record" in stack(4, 1)
    for attempt in range(1, 5):
        assert "gloo:all_reduce" in stack(attempt, 0)
        assert "loop.py" in stack(attempt, 0)


@pytest.mark.gloo
@pytest.mark.matrix  # not reliable yet: docs/reliability.md
def test_F17_a_rank_slowed_to_half_is_named_within_50_steps_and_nobody_in_1000_normal_ones(tmp_path, hangs):
    """F17: a rank is stopped and let go on so that it has half of its time. The watch names it within 50 steps, on the
    console and in `watch.jsonl`; in the 1,000 steps before, nobody is named."""
    recipe = project(
        tmp_path,
        model={"config": {**MODEL, "intermediate_size": 2048}},
        train={"max_steps": 1_000_000},
        checkpoint={"every_steps": 1_000_000, "rehearse": False},
        logging={"every_steps": 100},
        cluster={"preflight": False, "hang_timeout_s": None},
    )
    run, first, slowed_at = run_of(recipe), len(RankProcess.started), list[int]()

    def step_of_rank_1() -> int:
        beat = Pulse(scratch.folder() / "watch", 1).beat()
        return beat.step if beat is not None else 0

    def slow_rank_1() -> None:
        until("ranks", lambda: len(RankProcess.started) >= first + 2)
        ahead_of_others(pid_of(1, first))
        until("1,000 steps", lambda: steps_done(run) >= NORMAL_STEPS, timeout_s=600)
        pid = pid_of(1, first)
        ahead_of_others(pid, nice=0)  # and of whoever slows it
        slowed_at.append(step_of_rank_1())
        while not watched(run, "straggler") and step_of_rank_1() < slowed_at[0] + 10 * WITHIN:
            for _ in range(200):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(SHARE_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(SHARE_S)
        request_stop(run, "the test has seen enough")

    hangs.write_text("{}")
    with Meddler(slow_rank_1):
        code, said = trained(recipe)
    assert code == EXIT_PREEMPTED, said
    first_named = watched(run, "straggler")[0]
    assert (first_named["rank"], first_named["what"]) == (1, "computing"), first_named
    assert slowed_at[0] < first_named["step"] <= slowed_at[0] + WITHIN, (first_named, slowed_at)
    assert f"warning: rank 1 on {first_named['node']} is slow: it computes" in said


@pytest.mark.parametrize("ranks", [2, 8])
def test_F17_a_single_slow_step_or_group_names_nobody(ranks):
    """F17: one bad group of steps of every rank in turn is noise; a rank that is slow in four of five is named."""
    even = {rank: {group: Pace(1e-6, 0.0, 0.1) for group in range(GROUPS)} for rank in range(ranks)}
    for rank in range(ranks):
        noisy = {r: dict(groups) for r, groups in even.items()}
        for group in range(GROUPS - 2):
            noisy[rank][group] = Pace(50e-6, 5.0, 5.1)
        assert stragglers(noisy, 1.5) == []
    slow = {r: dict(groups) for r, groups in even.items()}
    slow[1] = {group: Pace(2e-6, 0.0, 0.2) for group in range(GROUPS)}
    (found,) = stragglers(slow, 1.5)
    assert (found.rank, found.kind, round(found.factor, 3)) == (1, "computing", 2.0)
    for rank in range(ranks):
        slow[rank] = {group: Pace(1e-6, 0.1 if rank == 1 else 0.0, 0.2) for group in range(GROUPS)}
    (found,) = stragglers(slow, 1.5)
    assert (found.rank, found.kind, round(found.factor, 3)) == (1, "data", 2.0)
