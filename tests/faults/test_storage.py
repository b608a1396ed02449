"""Storage that kills, fills up, stumbles, stalls or forgets under a save: F1, F3, F4, F5, F6, F34, F35."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.run.control import read_outcomes, request_stop
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import attempts, start_attempt, valid_checkpoints
from launcher.run.state import read_state
from launcher.trainer.checkpoint.verify import problems
from tests import ranks
from tests.faults.crash import Disk, Place
from tests.faults.shim import CHANGES, Shim
from tests.faults.storing import RANKS, Pair, Truth, live, train, whole
from tests.trainer import make
from tests.trainer.checkpoint.test_saving import small_disk  # noqa: F401
from tests.trainer.checkpoint.test_saving import (
    test_L7_a_disk_that_is_full_for_one_rank_only_fails_the_save_on_all as test_F05_a_real_disk_full_for_one_rank_only,  # noqa: F401
)
from tests.trainer.checkpoint.test_saving import (
    test_L7_a_full_disk_fails_one_save_and_the_next_succeeds_once_there_is_room as test_F05_a_real_full_disk,  # noqa: F401
)

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

KILLS = 100


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


def newest(pair: Pair) -> int:
    """Step of the newest checkpoint that counts, 0 without one."""
    return max((ref.step for ref in valid_checkpoints(pair.run)), default=0)


def save_until_killed(pair: Pair, begun: int, acknowledged: int) -> tuple[int, bool]:
    """(last step that was acknowledged, whether a rank was killed) of some saves."""
    for step in range(begun + 1, begun + 25):
        pair.send("save", [step])
        said = pair.answers()
        if said is None:
            return acknowledged, True
        assert said[0][0][0] == "done", said
        acknowledged = step
    return acknowledged, False


def test_F01_sigkill_of_any_rank_at_100_random_points_inside_a_save(shimmed: Shim, tmp_path: Path, truth: Truth):
    """F1: SIGKILL of any rank at 100 random calls inside a save: the newest complete checkpoint is found, each resume
    is exact, and nothing that was acknowledged is lost."""
    chance, kills, acknowledged = random.Random("F1"), 0, 0
    while kills < KILLS:
        with Pair(tmp_path, keep_last=1) as pair:
            begun = newest(pair)
            assert begun >= acknowledged, "a checkpoint that was acknowledged is lost"
            assert [answer["step"] for answer in pair.answers() or ()] == [begun] * RANKS
            rank = chance.randrange(RANKS)
            rule = shimmed.rule(*CHANGES, path=tmp_path, rank=rank, nth=chance.randint(1, 50 - 35 * rank), kill=True)
            acknowledged, killed = save_until_killed(pair, begun, begun)
            assert killed, f"rank {rank} made {rule.calls} calls only"
            assert pair.killed() == [rank]
            kills += 1
            shimmed.clear()
            assert all(whole(ref.path, truth) for ref in valid_checkpoints(pair.run))
    print(f"{kills} kills, {acknowledged} steps")
    assert acknowledged > KILLS // 5


@pytest.mark.parametrize("rank", range(RANKS))
def test_F03_sigkill_between_every_pair_of_calls_of_a_save(shimmed: Shim, tmp_path: Path, truth: Truth, rank: int):
    """F3: SIGKILL before every single call of a save and of the retention behind it, one after the other, on rank 0 and
    on another rank: no state of the folder is unloadable, and what is loaded is exact."""
    nth, acknowledged, seen = 0, 0, set()
    while True:
        nth += 1
        with Pair(tmp_path, keep_last=1) as pair:
            begun = newest(pair)
            assert begun >= acknowledged, nth
            assert [answer["step"] for answer in pair.answers() or ()] == [begun] * RANKS
            assert pair.ask("save", [begun + 1])[0][0][0] == "done"
            rule = shimmed.rule(*CHANGES, path=tmp_path, rank=rank, nth=nth, kill=True)
            pair.send("save", [begun + 2])
            said = pair.answers()
            acknowledged = begun + (1 if said is None else 2)
            shimmed.clear()
            good = [ref for ref in valid_checkpoints(pair.run) if whole(ref.path, truth)]
            assert good == valid_checkpoints(pair.run)
            assert good[-1].step in (begun + 1, begun + 2), nth
            if said is not None:
                assert rule.calls == nth - 1
                break
            assert pair.killed() == [rank]
            seen.add(good[-1].step - begun)
    print(f"{nth - 1} calls of rank {rank}")
    assert nth > (20 if rank == 0 else 4)
    assert seen == {1, 2} if rank == 0 else {1} <= seen


WRITES = ("create", "write", "mkdir")  # what needs space
FULL = "No space left on device"


@pytest.mark.parametrize("rank", range(RANKS))
def test_F05_no_space_at_each_write_of_a_save(shimmed: Shim, tmp_path: Path, truth: Truth, rank: int):
    """F5: ENOSPC at each call of a save that needs space, from that call on: the save fails and says so, the checkpoint
    before is intact, nothing is left behind, and once there is space the next save succeeds."""
    with Pair(tmp_path) as pair:
        pair.answers()
        assert pair.ask("save", [1])[0][0][0] == "done"
        good, step, nth, refused = 1, 1, 0, 0
        while True:
            nth, step = nth + 1, step + 1
            rule = shimmed.rule(*WRITES, path=tmp_path, rank=rank, nth=nth, times=-1, error="ENOSPC")
            (state, reason, needs), _ = (said[0] for said in pair.ask("save", [step]))
            rule.remove()
            assert [ref.step for ref in valid_checkpoints(pair.run)][-1] == (step if state == "done" else good), nth
            assert all(whole(ref.path, truth) for ref in valid_checkpoints(pair.run))
            if state == "failed":
                silent = "no word from ranks [1] within 20 s"  # of one that could not even make a name
                assert FULL in reason or "the disk is full" in reason or (rank and reason == silent), reason
                assert needs is None or "(the checkpoint needs " in reason
                assert not list(pair.run.checkpoints.glob(f"step-{step:08d}-*")), "what could not be finished is left"
                refused += 1
                step += 1
                assert pair.ask("save", [step])[0][0][0] == "done", "there is space again"
            good = step
            if rule.hits == 0:
                break
        assert refused >= (6 if rank == 0 else 2), nth


def test_F05_training_goes_on_over_a_full_disk_and_every_line_of_the_run_follows(shimmed: Shim, tmp_path: Path):
    """F5: the disk is full while a checkpoint, figures and the state are to be written: training goes on, the log says
    what is needed and free, later checkpoints are written, and no line of the figures is lost."""
    recipe = make.make_recipe("ddp", checkpoint__every_steps=2, checkpoint__keep_last=9)
    run = make.make_run(tmp_path, recipe, total_steps=6, evaluation=False)
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    rules = [
        shimmed.rule("write", path="step-00000002-a1/rank-00001", times=-1, error="ENOSPC"),
        shimmed.rule("write", path="metrics.jsonl", nth=2, times=2, error="ENOSPC"),
        shimmed.rule("write", path=".state.json", nth=1, times=1, error="ENOSPC"),
    ]
    ranks.run_ranks(train, 2, str(run.path), attempt)
    assert all(rule.hits for rule in rules)
    assert {outcome.kind for outcome in read_outcomes(run, attempt).values()} == {"finished"}
    steps = [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [ref.step for ref in valid_checkpoints(run)][-1] == 6
    assert 2 not in [ref.step for ref in valid_checkpoints(run)]
    said = run.log_file(attempt, "here", 0).read_text()
    assert "warning: no checkpoint was written: rank 1: the disk is full (the checkpoint needs " in said
    assert "are free). Training goes on and it is tried again" in said
    assert "warning: metrics.jsonl cannot be written (No space left on device). Training goes on" in said
    assert "warning: state.json cannot be written (No space left on device). Training goes on" in said


OPERATIONS = ("create", "open", "write", "read", "stat", "list", "fsync", "rename", "unlink", "mkdir", "rmdir")


@pytest.mark.parametrize("rank", range(RANKS))
def test_F06_eio_and_estale_at_each_call_of_a_save(shimmed: Shim, tmp_path: Path, truth: Truth, rank: int):
    """F6: EIO or ESTALE once, at each call of a save of each kind: it is tried again, and the save succeeds; after an
    fsync that failed the file is written anew. Only the fsync of a folder is not asked twice: that save fails in words,
    and the next one makes a new folder."""
    errors = ("EIO", "ESTALE")
    with Pair(tmp_path) as pair:
        pair.answers()
        assert pair.ask("save", [1])[0][0][0] == "done"
        step, calls, refusals = 1, 0, []
        for operation in OPERATIONS:
            nth, limit = 0, 25  # those who wait look again and again
            while (nth := nth + 1) <= limit:
                step += 1
                rule = shimmed.rule(operation, path=tmp_path, rank=rank, nth=nth, error=errors[nth % 2])
                state, reason, _ = pair.ask("save", [step])[0][0]
                rule.remove()
                assert all(whole(ref.path, truth) for ref in valid_checkpoints(pair.run)), (operation, nth)
                if state == "failed":
                    refusals.append((operation, reason))
                    assert "Input/output error" in reason or "Stale file handle" in reason
                    step += 1
                    assert pair.ask("save", [step])[0][0][0] == "done"
                assert valid_checkpoints(pair.run)[-1].step == step
                if not rule.hits:
                    break
                calls += 1
        print(f"rank {rank}: {calls} calls, {len(refusals)} refusals: {refusals}")
        assert {operation for operation, _ in refusals} <= {"fsync", "open"}
        assert calls > (45 if rank == 0 else 12)


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename", "unlink", "read", "stat", "list"])
def test_F06_storage_that_stays_bad_fails_the_save_in_words(
    shimmed: Shim, tmp_path: Path, truth: Truth, operation: str
):
    """F6: EIO for ever on one kind of call below checkpoints/: after a bound the save fails in words, no half state is
    left that counts, and when storage is back the next save succeeds."""
    with Pair(tmp_path) as pair:
        pair.answers()
        assert pair.ask("save", [1])[0][0][0] == "done"
        rule = shimmed.rule(operation, path=pair.run.checkpoint(2, pair.attempt), times=-1, error="EIO")
        state, reason, _ = pair.ask("save", [2])[0][0]
        assert rule.hits, "nothing was hit"
        rule.remove()
        assert (state, "Input/output error" in str(reason)) == ("failed", True), reason
        assert [ref.step for ref in valid_checkpoints(pair.run)] == [1]
        assert pair.ask("save", [3])[0][0][0] == "done"
        assert all(whole(ref.path, truth) for ref in valid_checkpoints(pair.run))


def test_F06_reading_goes_on_in_spite_of_one_error_and_falls_back_from_a_file_that_stays_unreadable(
    shimmed: Shim, tmp_path: Path, truth: Truth
):
    """F6: EIO or ESTALE once, at each call of a load: the newest checkpoint is loaded all the same. A file that stays
    unreadable is named and the checkpoint before it is taken."""
    with Pair(tmp_path) as pair:
        pair.answers()
        assert [state for state, _, _ in pair.ask("save", [1, 2])[0]] == ["done", "done"]
        calls = 0
        for rank in range(RANKS):
            for operation in ("open", "read", "stat", "list", "mmap"):
                nth = 0
                while True:
                    nth += 1
                    error = ("EIO", "ESTALE")[nth % 2]
                    rule = shimmed.rule(operation, path=tmp_path, rank=rank, nth=nth, error=error)
                    answers = pair.ask("load")
                    rule.remove()
                    assert answers == [{"step": 2, "problems": []}] * RANKS, (rank, operation, nth, answers)
                    if not rule.hits:
                        break
                    calls += 1
        assert calls > 40, calls
        shimmed.rule("read", path="step-00000002-a1/rank-00001", times=-1, error="EIO")
        problem = "step-00000002-a1/rank-00001.safetensors: Input/output error"
        assert pair.ask("load") == [{"step": 1, "problems": [problem]}] * RANKS


def test_F04_a_power_cut_after_any_call_leaves_a_run_that_can_be_loaded(shimmed: Shim, tmp_path: Path, truth: Truth):
    """F4: power cut after any call, with what was not fsynced dropped, reordered, cut or zeroed: what was acknowledged
    is there (run, attempts, the newest checkpoint), every checkpoint that counts is good and exact, and no file of the
    run directory is torn."""
    root = tmp_path / "disk"
    root.mkdir()
    with shimmed.recorded(root) as calls:
        process = ranks.context().Process(target=live, args=(root,))
        process.start()
        process.join(timeout=240)
    assert process.exitcode == 0
    known: dict[Any, bool] = {}

    def good(folder: Path) -> bool:
        content = (folder.name, *((file.name, file.read_bytes()) for file in sorted(folder.iterdir())))
        if content not in known:
            known[content] = whole(folder, truth)
        return known[content]

    disk, place, chance = Disk(root), Place(tmp_path / "after"), random.Random("F4")
    acks, checked, found = set[str](), set[Any](), list[Any]()
    for number, call in enumerate(calls):
        if "/acks" in call.path:
            acks.add(Path(call.path).name)
            continue
        disk.apply(call)
        for tree in (disk.now(), *disk.after_a_power_cut(chance)):
            key = (frozenset(tree.items()), len(acks))
            if key not in checked:
                checked.add(key)
                place.lay_out(tree)
                if wrong := what_is_wrong(RunDirectory(place.folder / "runs" / "one"), acks, good):
                    found.append((number, call.op, call.path, wrong))
    print(f"{len(calls)} calls, {len(checked)} states")
    assert not found, f"{len(found)} states, first: {found[0]}"
    assert len(checked) > 1000
    assert len(acks - {"acks"}) == 9


def what_is_wrong(run: RunDirectory, acks: set[str], good: Callable[[Path], bool]) -> str:
    """What a start would stumble over; empty when there is nothing."""
    if "made" in acks:
        if not run.exists() or run.read_json("run.json")["identity"] != {"identity": 3}:
            return "run.json is gone"
        if (run.read_recipe(), run.read_json("data.json")) != ({"recipe": 1}, {"total_steps": 4}):
            return "recipe.yaml or data.json is another"
    if run.exists() and run.read_recipe() != {"recipe": 1}:
        return "run.json is there and recipe.yaml is not"
    known = {attempt.number: attempt for attempt in attempts(run)}
    for number in (1, 2):
        if f"start-{number}" in acks and number not in known:
            return f"attempt {number} is forgotten"
        if f"end-{number}" in acks and not known[number].ended:
            return f"the end of attempt {number} is forgotten"
    refs = valid_checkpoints(run)
    if bad := [ref.path.name for ref in refs if not good(ref.path)]:
        return f"{bad} count and cannot be loaded"
    steps = [int(ack.removeprefix("step-")) for ack in acks if ack.startswith("step-")]
    if steps and (not refs or refs[-1].step < max(steps)):
        return f"step {max(steps)} was acknowledged and is lost; there is {refs}"
    if "end-2" in acks and read_state(run).status != "preempted":
        return f"the state is {read_state(run)}"
    return ""


def test_F34_saves_that_overtake_each_other_are_ordered_none_is_lost_and_memory_is_bounded(
    shimmed: Shim, tmp_path: Path, truth: Truth
):
    """F34: an asynchronous save is still running when the next one comes, and when the end comes: they are written in
    order, none is lost, each holds the state of its own step, and there is one copy in memory."""
    gate = tmp_path / "gate"
    with Pair(tmp_path, keep_last=9) as pair:
        pair.answers()
        shimmed.rule("write", path="step-00000001", times=-1, stall_s=600, release=gate)
        pair.ask("begin", 1)
        pair.ask("learn_to", 5)  # training goes on
        before = pair.ask("standing")
        assert [said["in flight"] for said in before] == [True, True]
        pair.send("begin", 6)
        assert not any(pipe.poll(0.3) for pipe in pair.pipes), "the second save did not wait for the first"
        assert [folder.name for folder in pair.run.checkpoints.iterdir()] == ["step-00000001-a1"]
        gate.touch()
        assert pair.answers() == [None, None]
        gate.unlink()
        shimmed.rule("write", path="step-00000007", times=-1, stall_s=600, release=gate)
        pair.ask("begin", 7)
        pair.send("end", 8)
        assert not any(pipe.poll(0.3) for pipe in pair.pipes), "the end did not wait for the save"
        gate.touch()
        assert pair.answers() == ["durable", "durable"]
        refs = valid_checkpoints(pair.run)
        assert [ref.step for ref in refs] == [1, 6, 7, 8]
        assert all(whole(ref.path, truth) for ref in refs)
        order = [(ref.path / MARKER).stat().st_mtime_ns for ref in refs]
        assert order == sorted(order)
        assert [said["memory"] for said in pair.ask("standing")] == [said["memory"] for said in before]


def test_F35_training_goes_on_while_storage_stalls_in_an_asynchronous_save(shimmed: Shim, tmp_path: Path):
    """F35: storage stalls in the middle of an asynchronous save: steps go on, the log says since when storage has not
    answered and when it does again. F34: SIGTERM while that save is in flight: both checkpoints are durable."""
    recipe = make.make_recipe("ddp", checkpoint__every_steps=20, checkpoint__async_save=True, logging__every_steps=1)
    run, gate = make.make_run(tmp_path, recipe, total_steps=100_000, evaluation=False), tmp_path / "gate"
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    stall = shimmed.rule("write", path="step-00000020", times=-1, stall_s=600, release=gate)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(ranks.run_ranks, train, 2, str(run.path), attempt)
        try:
            reached(run, ended, lambda: stall.hits == 2)
            log = run.log_file(attempt, "here", 0)
            reached(run, ended, lambda: len(run.metrics_file.read_text().splitlines()) >= 35)
            reached(run, ended, lambda: "warning: storage has not answered since " in log.read_text())
            assert not valid_checkpoints(run)
            os.kill(int((run.path / "pid-1").read_text()), signal.SIGTERM)
            time.sleep(0.5)
            assert not ended.done(), "the end did not wait for the save"
        finally:
            gate.touch()
            request_stop(run, "the test is over")
        ended.result()
    outcomes = read_outcomes(run, attempt)
    assert {outcome.kind for outcome in outcomes.values()} == {"stopped"}
    (stopped,) = {outcome.step for outcome in outcomes.values()}
    assert [ref.step for ref in valid_checkpoints(run)] == [20, stopped]
    assert not [problem for ref in valid_checkpoints(run) for problem in problems(ref.path)]
    said = log.read_text()
    assert "a checkpoint is writing rank-00000.safetensors. Training goes on." in said
    assert "storage answers again, after " in said


def reached(run: RunDirectory, ended: Future[Any], holds: Callable[[], bool], *, timeout_s: float = 180) -> None:
    """Wait for a state of a run that trains."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert not ended.done(), ended.exception()
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
