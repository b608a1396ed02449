"""What checkpoint tests share: a run with an attempt, an engine without process group, saves of several ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.run import ledger
from launcher.run.directory import MARKER, RunDirectory
from launcher.trainer.checkpoint.format import CheckpointError, Piece, take_snapshot
from launcher.trainer.checkpoint.manager import CheckpointManager
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.checkpoint.saving import Save, carry_out, make_folder
from launcher.trainer.checkpoint.verify import MANIFEST, header_metadata, marker_text, read_manifest

KINDS = ("value", "exp_avg", "exp_avg_sq")


class OddShapes(nn.Module):
    """Parameters that no number of ranks divides, one of a single element, one of half precision, and a counter."""

    def __init__(self, seed: int = 0, width: int = 61) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("wide", (7, width)), ("one", (1,)), ("cube", (3, 5, 11)), ("long", (257,))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.low = nn.Parameter(torch.randn(13, 3, generator=generator).bfloat16())
        self.register_buffer("counter", torch.tensor([seed, 2, 3]))


class FlatEngine:
    """One of `world_size` ranks that each hold a cut of every parameter; rank and ranks are only numbers here."""

    def __init__(self, module: nn.Module, *, rank: int = 0, world_size: int = 1) -> None:
        self.module, self.rank, self.world_size = module, rank, world_size
        self.step = 0
        self.moments: dict[str, dict[str, Tensor]] = {}

    def ensure_state(self) -> None:
        for name, p in self.module.named_parameters():
            if name not in self.moments:
                self.moments[name] = {kind: torch.zeros_like(p) for kind in KINDS[1:]}

    def set_step(self, step: int) -> None:
        self.step = step

    def refresh(self) -> None:
        pass

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        self.ensure_state()
        for name, p in self.module.named_parameters():
            yield name, "value", p.detach()
            yield from ((name, kind, self.moments[name][kind]) for kind in KINDS[1:])
        yield from ((name, "value", buffer) for name, buffer in self.module.named_buffers())

    def pieces(self) -> Iterator[Piece]:
        for name, kind, tensor in self.states():
            n = tensor.numel()
            first, end = self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size
            yield Piece(name, kind, first, tensor.view(-1)[first:end])

    def parameter_shapes(self) -> dict[str, dict[str, Any]]:
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "trainable": t.requires_grad}
            for name, t in named
        }

    def disturb(self, seed: int) -> None:
        """Change all state, as training would."""
        generator = torch.Generator().manual_seed(seed)
        for _, _, tensor in self.states():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(seed)

    def snapshot(self) -> dict[tuple[str, str], Tensor]:
        return {(name, kind): tensor.clone() for name, kind, tensor in self.states()}


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    """Equal keys, and every tensor equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def begin(path: Path) -> tuple[RunDirectory, int]:
    """A run in `path`, and a new attempt of it."""
    run = RunDirectory(path)
    attempt = ledger.start_attempt(run, target="torchrun", job_id=None, nodes=["here"], reason="test")
    return run, attempt


def manager(run: RunDirectory, attempt: int, **options: Any) -> CheckpointManager:
    """A manager of one rank alone."""
    return CheckpointManager(run, attempt=attempt, rank=0, world_size=1, meta={"run_id": "this-run"}, **options)


def saved(manager: CheckpointManager, step: int, engine: FlatEngine) -> Path:
    """Save and wait; the folder."""
    manager.save(step, engine, {"step": step})
    status = manager.wait()
    assert status.state == "done", status
    return manager.run.checkpoint(step, manager.attempt)


def save_with_ranks(
    run: RunDirectory, attempt: int, step: int, modules: list[nn.Module], *, patience_s: float = 60
) -> list[str]:
    """A save by as many ranks as there are modules, each in a thread; why it failed, by rank ("" = done)."""
    folder, world_size = run.checkpoint(step, attempt), len(modules)
    make_folder(folder)
    reasons = [""] * world_size

    def rank_part(rank: int) -> None:
        engine = FlatEngine(modules[rank], rank=rank, world_size=world_size)
        manifest = {
            "version": 1, "run_id": "this-run", "step": step, "attempt": attempt, "world_size": world_size,
            "params": FlatEngine(modules[0]).parameter_shapes(), "trainer_state": {"step": step},
        }  # fmt: skip
        snapshot = take_snapshot(engine.pieces(), header_metadata(manifest, rank), None)
        fence = partial(ledger.fenced, run, attempt)
        try:
            carry_out(Save(folder, rank, world_size, snapshot, manifest, patience_s, fence))
        except CheckpointError as error:
            reasons[rank] = str(error)

    threads = [threading.Thread(target=rank_part, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reasons


def commit(folder: Path, manifest: str) -> None:
    """Put a manifest of one's own into a checkpoint, with the marker that vouches for it."""
    (folder / MANIFEST).write_text(manifest)
    (folder / MARKER).write_text(marker_text(manifest.encode()))


def read_back(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Everything in a checkpoint."""
    reader = Reader(folder, read_manifest(folder))
    pairs = [(name, kind) for name in reader.manifest["params"] for kind in reader.manifest["kinds"]]
    found = {}
    for name, kind in pairs:
        with contextlib.suppress(KeyError):  # buffers have no moments
            found[name, kind] = reader.read(name, kind)
    return found
