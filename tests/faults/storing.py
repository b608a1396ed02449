"""Two real ranks that save and load on command, so that faults of storage can be put under every single call of them.

Their state is a small model whose every step depends on the one before, so that a resume which is not exact shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.run.files import write_atomic
from launcher.run.state import write_state
from launcher.trainer.checkpoint import retention
from launcher.trainer.checkpoint.format import take_snapshot
from launcher.trainer.checkpoint.reader import header_metadata
from launcher.trainer.checkpoint.saving import Save, carry_out, make_folder
from tests import ranks
from tests.trainer.checkpoint import rigs

RANKS = 2


class Learner(rigs.FlatEngine):
    """An engine whose next state follows from the last one and the number of the step."""

    def __init__(self, **place: int) -> None:
        module = nn.Module()
        generator = torch.Generator().manual_seed(5)
        module.odd = nn.Parameter(torch.randn(7, 3, generator=generator))
        module.one = nn.Parameter(torch.randn(1, generator=generator))
        super().__init__(module, **place)

    def trainer_state(self) -> dict[str, Any]:
        return {}

    def learn(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for _, _, tensor in self.states():
            tensor.mul_(0.75).add_(torch.randn(tensor.shape, generator=generator))


class Truth:
    """The states of a run that nothing happened to."""

    def __init__(self) -> None:
        self._engine, self._states = Learner(), []  # type: ignore[var-annotated]
        self._states.append(self._engine.snapshot())

    def at(self, step: int) -> dict[Any, torch.Tensor]:
        while len(self._states) <= step:
            self._engine.learn(len(self._states))
            self._states.append(self._engine.snapshot())
        return self._states[step]


def whole(folder: Path, truth: Truth) -> bool:
    """Whether a checkpoint is good in every byte and holds exactly what belongs to its step."""
    from launcher.trainer.checkpoint.verify import problems

    step = int(folder.name[5:13])
    return not problems(folder, run_id="this-run") and rigs.same(rigs.read_back(folder), truth.at(step))


class Pair:
    """One attempt of a run on two ranks, each in a process of its own; used as a context that ends them.

    Args:
        pauses_s: between the tries of storage that stumbles
    """

    def __init__(self, path: Path, *, keep_last: int = 2, asynchronous: bool = True, pauses_s: float = 0.001) -> None:
        self.run = RunDirectory(path)
        self.attempt = ledger.start_attempt(self.run, target="test", job_id=None, nodes=["here"], reason="test")
        port, context = ranks.free_port(), ranks.context()
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            options = {"keep_last": keep_last, "asynchronous": asynchronous, "patience_s": 20.0}
            arguments = (rank, port, there, path, self.attempt, options, pauses_s)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def send(self, command: str, *values: Any) -> None:
        """Let both ranks begin something; to a dead one it is not said."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((command, values))

    def answers(self, *, timeout_s: float = 90) -> list[Any] | None:
        """What each rank says; None as soon as one of them is dead."""
        said: dict[int, Any] = {}
        while len(said) < RANKS:
            silent = {self.pipes[rank]: rank for rank in range(RANKS) if rank not in said}
            ready = connection.wait([*silent, *(process.sentinel for process in self.processes)], timeout_s)
            assert ready, f"ranks {list(silent.values())} said nothing in {timeout_s} s"
            for pipe in ready:
                if pipe in silent:
                    try:
                        said[silent[pipe]] = pipe.recv()
                    except (EOFError, ConnectionResetError):
                        return None
            if not any(pipe in silent for pipe in ready):
                return None
        return [said[rank] for rank in range(RANKS)]

    def ask(self, command: str, *values: Any) -> list[Any]:
        """The same of ranks that must not die of it."""
        self.send(command, *values)
        said = self.answers()
        assert said is not None, "a rank died"
        return said

    def killed(self) -> list[int]:
        """Ranks that SIGKILL ended; the other one is ended too, as an agent does."""
        connection.wait([process.sentinel for process in self.processes], timeout=30)
        found = [rank for rank, process in enumerate(self.processes) if process.exitcode == -signal.SIGKILL]
        self.__exit__()
        return found

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()


def _serve(
    rank: int, port: int, pipe: Connection, path: Path, attempt: int, options: dict[str, Any], pauses_s: float
) -> None:
    """One rank: loads what there is, then does what it is told until nobody speaks any more."""
    import torch.distributed as dist

    from launcher.recipe.schema import Checkpoint
    from launcher.run import files
    from launcher.trainer.checkpoint import saving as checkpoint_saving
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.saving import Saver

    torch.set_num_threads(1)
    files.RETRY_PAUSES_S, checkpoint_saving.GRACE_S = (pauses_s,) * 4, 2.0
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo")
    given: dict[str, Any] = {"attempt": attempt, "rank": rank, "world_size": RANKS, "meta": {"run_id": "this-run"}}
    manager, engine = CheckpointManager(RunDirectory(path), **given, **options), Learner(rank=rank, world_size=RANKS)

    def load() -> dict[str, Any]:
        reading = CheckpointManager(RunDirectory(path), **given, **options)
        state = reading.load_latest(engine)
        return {"step": state["step"] if state else 0, "problems": reading.problems}

    def learn_to(step: int) -> None:
        while engine.step < step:
            engine.step += 1
            engine.learn(engine.step)

    def begin(step: int) -> None:
        learn_to(step)
        manager.save(step, engine, {"step": step})

    def save(steps: Iterable[int]) -> list[Any]:
        """A save of each step; each is done or has failed before the next begins."""
        found = []
        for step in steps:
            begin(step)
            status = manager.wait()
            found.append((status.state, status.reason, status.needs))
        return found

    def standing() -> dict[str, Any]:
        buffer = manager._buffer
        return {
            "in flight": manager.in_flight(), "doing": manager.progress.doing,
            "memory": buffer._memory.data_ptr() if buffer is not None else None,
        }  # fmt: skip

    def end(step: int) -> str:
        """What the loop does at its end and when it was asked to stop."""
        learn_to(step)
        saver = Saver(manager, engine, Checkpoint(), step=None, rank=rank)  # type: ignore[arg-type]
        saver.save_durably(step, torch.device("cpu"))
        return "durable"

    commands = {"load": load, "learn_to": learn_to, "begin": begin, "save": save, "standing": standing, "end": end,
                "wait": lambda: manager.wait().state}  # fmt: skip
    pipe.send(load())
    while True:
        try:
            command, values = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(commands[command](*values))
        except BaseException as error:
            pipe.send(f"{type(error).__name__}: {error}")


def live(root: Path) -> None:
    """Two attempts of a run from its making to its end, with saves of two ranks and retention; `acks/` says what was
    acknowledged, when."""
    run, truth = RunDirectory(root / "runs" / "one"), Truth()
    (root / "acks").mkdir()

    def acknowledge(what: str) -> None:
        (root / "acks" / what).mkdir()

    run.create({"recipe": 1}, {"plan": 2}, {"identity": 3})
    write_atomic(run.data_file, json.dumps({"total_steps": 4}))
    acknowledge("made")
    for attempt in (1, 2):
        assert ledger.start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test") == attempt
        acknowledge(f"start-{attempt}")
        retention.sweep(run, attempt=attempt)
        for step in range(2 * attempt - 1, 2 * attempt + 1):
            _save(run, attempt, step, truth)
            acknowledge(f"step-{step}")
            retention.retain(run, attempt=attempt, keep_last=1, keep_every_steps=None)
            write_state(run, "running", attempt=attempt, step=step)
        write_state(run, "preempted", attempt=attempt, step=step)
        ledger.end_attempt(run, attempt, step=step, outcome_class="preempted", verdict="requeue")
        acknowledge(f"end-{attempt}")


def _save(run: RunDirectory, attempt: int, step: int, truth: Truth) -> None:
    """One save by ranks that are threads; the calls they make are those of processes."""
    folder = run.checkpoint(step, attempt)
    make_folder(folder)

    def part(rank: int) -> None:
        engine = Learner(rank=rank, world_size=RANKS)
        engine.ensure_state()
        states = truth.at(step)
        for name, kind, tensor in engine.states():
            tensor.copy_(states[name, kind])
        manifest = {
            "version": 1, "run_id": "this-run", "step": step, "attempt": attempt, "world_size": RANKS,
            "params": engine.parameter_shapes(), "trainer_state": {"step": step},
        }  # fmt: skip
        snapshot = take_snapshot(engine.pieces(), header_metadata(manifest, rank), None)
        carry_out(Save(folder, rank, RANKS, snapshot, manifest, 60.0, partial(ledger.fenced, run, attempt)))

    truth.at(step)
    with ThreadPoolExecutor(RANKS) as pool:
        for done in [pool.submit(part, rank) for rank in range(RANKS)]:
            done.result()


def train(rank: int, world_size: int, path: str, attempt: int) -> None:
    """A rank as the launcher starts it, which calls storage silent after a fraction of a second."""
    from launcher.trainer import saving
    from launcher.trainer.main import run_rank

    saving.STALL_S = 0.3
    os.environ.update(LAUNCHER_LOG="1", LAUNCHER_NODE="here")
    Path(path, f"pid-{rank}").write_text(str(os.getpid()))
    run_rank(path, attempt)
