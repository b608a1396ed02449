"""L4 and L7 under SIGKILL: real processes die at random moments, most inside a save; only the last steps are lost."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory
from tests import ranks
from tests.trainer import make
from tests.trainer.checkpoint import rigs, training

KILLS = 50


def save_for_ever(path: Path) -> None:
    """Load the newest checkpoint, whose state must be that of its step, and go on saving until the end."""
    run = RunDirectory(path)
    attempt = ledger.latest_attempt(run)
    manager, engine = rigs.manager(run, attempt, keep_last=2), rigs.FlatEngine(rigs.OddShapes())
    state = manager.load_latest(engine)
    step = state["step"] if state else 0
    assert manager.problems == []
    expected = rigs.FlatEngine(rigs.OddShapes())
    if step:
        expected.disturb(step)
        assert rigs.same(engine.snapshot(), expected.snapshot())
    (path / f"loaded-a{attempt}").touch()
    while True:
        step += 1
        engine.disturb(step)
        manager.save(step, engine, {"step": step})
        while (status := manager.poll()).state == "done":
            assert status.reason is None


def wait_until(happened: Callable[[], bool], processes: list[Any]) -> None:
    """Raises AssertionError when a process ends before."""
    while not happened():
        assert all(process.is_alive() for process in processes), "a process ended by itself"
        time.sleep(0.005)


def unfinished(run: RunDirectory) -> bool:
    """Whether a folder without marker lies there, as a kill inside a save or inside retention leaves it."""
    return any(not (folder / MARKER).exists() for folder in run.checkpoints.glob("*"))


@pytest.mark.gloo
def test_L7_the_newest_checkpoint_is_good_after_each_of_50_kills_of_a_saving_process(tmp_path):
    """The process saves without pause and deletes the checkpoints it keeps no longer, so that both are hit."""
    rng, reached, inside = random.Random(3), 0, 0
    for _ in range(KILLS):
        run, attempt = rigs.begin(tmp_path)
        process = ranks.context().Process(target=save_for_ever, args=(tmp_path,), daemon=True)
        process.start()
        try:
            wait_until((tmp_path / f"loaded-a{attempt}").exists, [process])
            time.sleep(rng.uniform(0, 0.05))
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, "it did not live until it was killed"
        inside += unfinished(run)
        if valid := ledger.valid_checkpoints(run):
            newest = valid[-1]
            expected = rigs.FlatEngine(rigs.OddShapes())
            expected.disturb(newest.step)
            assert rigs.same(rigs.read_back(newest.path), expected.snapshot())
            assert newest.step >= reached, "a committed step was lost"
            reached = newest.step
    print(f"{KILLS} kills, {inside} of them inside a save, {reached} steps")
    assert reached > 0


def train_for_ever(rank: int, world_size: int, path: Path, kind: str) -> None:
    training.train(rank, world_size, path, kind, 100_000)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_L4_steps_are_bit_exact_after_each_of_25_kills_of_any_rank(tmp_path, kind):
    """Every loss that was ever computed, every row of every batch, and the final state equal a run without kills."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for path in (whole, killed):
        path.mkdir()
        make.documents_store(path)
    rng, inside = random.Random(kind), 0
    for _ in range(KILLS // 2):
        run, attempt = rigs.begin(killed)
        kill_some_rank(killed, attempt, kind, rng)
        inside += unfinished(run)
    steps = ledger.valid_checkpoints(RunDirectory(killed))[-1].step + 2
    rigs.begin(killed)
    last = ranks.run_ranks(training.train, 2, killed, kind, steps)[0]
    rigs.begin(whole)
    straight = ranks.run_ranks(training.train, 2, whole, kind, steps)[0]
    print(f"{kind}: {KILLS // 2} kills, {inside} of them inside a save, {steps} steps")
    assert last["final"] == straight["final"]
    for line in (killed / "losses.jsonl").read_text().splitlines():
        step, rows, loss = json.loads(line)
        assert (rows, loss) == (straight["rows"][step], straight["losses"][step]), step


def steps_taken(path: Path) -> int:
    """Over all attempts, repeated ones included."""
    losses = path / "losses.jsonl"
    return losses.read_bytes().count(b"\n") if losses.exists() else 0


def kill_some_rank(path: Path, attempt: int, kind: str, rng: random.Random) -> None:
    """Two ranks train; a random one dies at a random moment of some step, the other shortly after, as agents see to."""
    port, processes, pipes = ranks.free_port(), [], []
    wanted = steps_taken(path) + rng.randint(0, 4)
    for rank in range(2):
        parent, child = ranks.context().Pipe(duplex=False)
        pipes.append(parent)
        arguments = (train_for_ever, rank, 2, port, child, (path, kind))
        processes.append(ranks.context().Process(target=ranks._rank, args=arguments, daemon=True))
        processes[-1].start()
        child.close()
    try:
        if rng.random() < 0.9:  # else in the middle of starting or loading
            wait_until(lambda: (path / f"loaded-a{attempt}").exists() and steps_taken(path) >= wanted, processes)
        time.sleep(rng.uniform(0, 0.1))
        assert all(process.is_alive() for process in processes), "a rank ended by itself"
        rng.choice(processes).kill()
        time.sleep(rng.uniform(0, 0.05))
    finally:
        for process in processes:
            process.kill()
            process.join()
