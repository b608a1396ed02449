"""A save while training goes on: what it holds, what waits for it, and how its failure is told, for every engine."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.recipe.schema import Checkpoint
from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint import saving
from launcher.trainer.checkpoint.format import HostBuffer, Piece, take_snapshot
from launcher.trainer.checkpoint.manager import CheckpointManager
from launcher.trainer.saving import Saver
from tests import ranks
from tests.trainer import make
from tests.trainer.checkpoint import crossing, rigs, training

STRATEGIES = ["ddp", "fsdp2-offload", "zero1", "zero2-offload", "zero3", "zero3-offload"]


class Gate:
    """Stands before the disk: files are written while it is open, and fail where it is told so."""

    def __init__(self) -> None:
        self.open, self.failing = threading.Event(), False
        self.written: list[str] = []
        self._write = saving.write_file
        self.open.set()

    def __call__(self, path: Path, snapshot: Any, **more: Any) -> Any:
        assert self.open.wait(60)
        if self.failing:
            raise OSError(30, "Read-only file system")
        self.written.append(path.parent.name)
        return self._write(path, snapshot, **more)


def live(engine: Any) -> dict[tuple[str, str, int], Any]:
    """A copy of this rank's part of the state."""
    engine.ensure_state()
    return {(p.name, p.kind, p.start): p.tensor.clone().numpy() for p in engine.pieces()}


def stages(rank: int, world_size: int, folder: Path, strategies: list[str]) -> dict[str, Any]:
    """For each strategy: saves held up at the disk while steps, further saves and a stop come; what was seen."""
    found = {}
    gate = Gate()
    saving.write_file = gate  # type: ignore[assignment]
    for strategy in strategies:
        run = RunDirectory(folder / strategy)
        words = crossing.recipe(strategy, "fp32", world_size)
        engine, backend = make.make_engine(words, rank=rank)
        manager = CheckpointManager(
            run, attempt=1, rank=rank, world_size=world_size, meta={"run_id": "this-run"}, keep_last=9
        )
        saver = Saver(manager, engine, Checkpoint(), step=None, rank=rank)
        data = make.batches(folder / "packed", words, rank=rank, world_size=world_size, total_steps=9)

        def step(number: int, engine: Any = engine, data: Any = data, backend: str = backend) -> None:
            make.forward_backward(engine, data.step(number), world_size=world_size, backend=backend)
            engine.clip_and_step(1e-2, 1.0)

        seen: dict[str, Any] = {}
        step(0)
        held = {1: training.truth(engine)}
        before = live(engine)
        gate.open.clear()
        saver.save(1)
        seen["in flight"] = manager.poll().state
        step(1)  # changes in place all that is being saved
        seen["changed"] = sum(bool((before[key] != value).any()) for key, value in live(engine).items() if value.size)
        seen["pieces"] = sum(value.size > 0 for value in before.values())
        held[2] = training.truth(engine)
        memory = manager._buffer._memory.data_ptr()  # type: ignore[union-attr]
        threading.Timer(0.2, gate.open.set).start()
        begun = time.monotonic()
        saver.save(2)  # waits for the one in flight: memory for one copy is enough
        seen["waited"] = time.monotonic() - begun
        seen["memory"] = manager._buffer._memory.data_ptr() == memory  # type: ignore[union-attr]
        manager.wait()
        seen["threads"] = sum("_work" in thread.name for thread in threading.enumerate())
        saver.look()
        step(2)
        held[3] = training.truth(engine)
        gate.failing = rank == world_size - 1  # the disk of the last rank
        saver.save(3)
        step(3)
        manager._join()
        saver.look()
        seen["failed"], gate.failing = saver._problem, False
        held[4] = training.truth(engine)
        gate.open.clear()
        saver.save(4)
        threading.Timer(0.2, gate.open.set).start()
        saver.save_durably(4, engine.device)  # a stop, or the end, while that save is in flight: it is the last one
        seen["at the end"] = (run.checkpoint(4, 1) / "COMMITTED").exists()
        seen["order"] = [int(name[5:13]) for name in gate.written if run.checkpoint(int(name[5:13]), 1).name == name]
        gate.written.clear()
        found[strategy] = {**seen, "held": held}
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: Any) -> tuple[Path, list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("flight")
    make.documents_store(folder)
    crossing.begin_all(folder, STRATEGIES)
    return folder, ranks.run_ranks(stages, 2, folder, STRATEGIES)


@pytest.mark.gloo
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_save_holds_the_state_of_its_step_though_training_goes_on(seen, strategy):
    folder, results = seen
    run = RunDirectory(folder / strategy)
    assert [ref.step for ref in ledger.valid_checkpoints(run)] == [1, 2, 4]
    for result in results:
        now = result[strategy]
        assert now["in flight"] == "in flight"
        assert now["changed"] == now["pieces"], "the step did not change what was being saved"
        for step in (1, 2, 4):
            stored = rigs.read_back(run.checkpoint(step, 1))
            hashes = {f"{name} {kind}": training.digest(tensor) for (name, kind), tensor in stored.items()}
            expected = {key: value for key, value in now["held"][step].items() if not key.endswith(" step")}
            assert hashes == expected, step


@pytest.mark.gloo
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saves_are_ordered_bounded_in_memory_and_the_last_one_is_waited_for(seen, strategy):
    for result in seen[1]:
        now = result[strategy]
        assert now["waited"] >= 0.1, "the second save did not wait for the first"
        assert now["memory"], "a second buffer was taken"
        assert now["threads"] == 0
        assert now["at the end"]
        assert now["order"] == sorted(set(now["order"])), "a step was written twice or out of order"
        assert now["order"][-1] == 4


@pytest.mark.gloo
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_on_one_rank_is_told_on_every_rank_and_leaves_nothing(seen, strategy):
    folder, results = seen
    reason = "rank 1: rank-00001.safetensors: Read-only file system"
    assert [result[strategy]["failed"] for result in results] == [reason, reason]
    assert not RunDirectory(folder / strategy).checkpoint(3, 1).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_gpu_is_complete_and_waits_for_no_other_stream():
    state = torch.full((1 << 26,), 1.0, device="cuda")
    buffer, other = HostBuffer(pinned=True), torch.cuda.Stream()
    take_snapshot([Piece("p", "value", 0, state)], {}, buffer)  # the buffer is made
    state.fill_(2.0)  # queued, perhaps not yet done
    with torch.cuda.stream(other):
        torch.cuda._sleep(4_000_000_000)  # about two seconds
    begun = time.monotonic()
    snapshot = take_snapshot([Piece("p", "value", 0, state)], {}, buffer)
    assert time.monotonic() - begun < 1.0, "another stream's work was waited for"
    assert not other.query()
    state.fill_(3.0)
    torch.cuda.synchronize()
    (copied,) = snapshot.ranges()
    assert copied.is_pinned()
    assert bool((copied.view(torch.float32) == 2.0).all())
