"""Whether a checkpoint can be written and read back here, tried out before the first step instead of hours later.

Saves, verifies, loads back and removes a checkpoint of the untrained state, by the code that every other one goes
through. What is learnt afterwards is the same, bit for bit, as without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import xxhash

from launcher.errors import UserError
from launcher.plan.disk import size_text
from launcher.run.directory import checkpoint_name
from launcher.run.rehearsal import Rehearsal, write_rehearsal
from launcher.trainer.beat import beat
from launcher.trainer.checkpoint import retention
from launcher.trainer.checkpoint.format import CheckpointError, share_replicas
from launcher.trainer.failures import SaveError

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.lanes import LanesTaken
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.engines import Engine

_PART = 1 << 26  # bytes that are hashed at a time
_SWITCH = "To train without trying it: checkpoint.rehearse=false."


def rehearse(
    run: RunDirectory,
    manager: CheckpointManager,
    engine: Engine,
    *,
    given: Collection[str],
    lanes: Callable[[int], LanesTaken] | None,
) -> Rehearsal:
    """Save, verify, load back, compare and remove a checkpoint of step 0; collective.

    Args:
        given: names of the parameters that a checkpoint may leave out
        lanes: see `Saver`
    Raises:
        UserError: there is no room, no permission, no memory for the copy; on every rank.
        SaveError: it could not be written, or does not come back as it was written; on every rank.
    """
    name = checkpoint_name(0, manager.attempt)
    engine.ensure_state()
    before, needed = _digests(engine), _share(engine)
    _agree(_lacking_memory(manager, needed))
    state = {"step": 0, **engine.trainer_state()}
    beat("start")
    manager.save(0, engine, state, lanes=None if lanes is None else lanes(0))
    status = manager.wait()
    beat("start")  # whatever moves shows that this rank lives
    total = int(_sum(needed, engine.device))
    problem = status.reason or "another rank could not write its part" if status.state == "failed" else None
    _agree(_words(run, problem, total) if problem else None)
    began = time.monotonic()
    try:
        loaded = manager.read_back(name, engine, given=given)
        engine.load_trainer_state(loaded)
        differs = [piece for piece, digest in _digests(engine).items() if before[piece] != digest]
        problem = f"{', '.join(differs[:3])} came back with other values" if differs else None
    except CheckpointError as error:
        problem = str(error)
    took = time.monotonic() - began
    engine.forget_state()
    try:
        _agree(None if problem is None else SaveError(_lossy(run, problem)))
    finally:  # all ranks have read
        if manager.rank == 0:
            with contextlib.suppress(OSError):
                retention.discard(run.checkpoints / name)
    return Rehearsal(total, status.blocked_s, status.durable_s, took, manager.world_size, manager.attempt)


def tell(run: RunDirectory, found: Rehearsal) -> None:
    """Write it into the run directory and on the console; rank 0."""
    write_rehearsal(run, found)
    print(
        f"rehearsal: a checkpoint of {size_text(found.bytes)} was durable after {_seconds(found.durable_s)} (training "
        f"stood still for {_seconds(found.blocked_s)}), and verified and loaded back in {_seconds(found.load_s)}",
        flush=True,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _share(engine: Engine) -> int:
    """Bytes that this rank writes."""
    return sum(p.tensor.numel() * p.tensor.element_size() for p in share_replicas(engine.pieces()))


def _digests(engine: Engine) -> dict[str, str]:
    """What each live piece holds, by name, kind and start."""
    found = {}
    for piece in engine.pieces():
        digest, data = xxhash.xxh3_128(), piece.tensor.detach().view(torch.uint8)
        for at in range(0, data.numel(), _PART):
            digest.update(data[at : at + _PART].cpu().numpy())
        found[f"{piece.name} {piece.kind} from {piece.start}"] = digest.hexdigest()
    return found


def _lacking_memory(manager: CheckpointManager, needed: int) -> UserError | None:
    """What to say where the host has no room for the copy that an asynchronous save writes from."""
    if not manager.asynchronous:
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = _available_memory()
    try:
        if free is not None and free < needed * ranks:
            raise MemoryError(f"{size_text(free)} of this host's memory are free")
        manager.reserve(needed)
    except (MemoryError, RuntimeError) as error:  # torch says both
        return UserError(
            f"checkpoint.async_save = true: expected host memory for a copy of what each rank writes, {ranks} x "
            f"{size_text(needed)} on this node: {str(error).splitlines()[0]}. Use checkpoint.async_save=false, which "
            "writes from the live state while training waits, or fewer ranks on a node."
        )
    return None


def _available_memory() -> int | None:
    """Bytes that new allocations of this host can have without swapping; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _words(run: RunDirectory, problem: str, total: int) -> Exception:
    """A save that failed, and what to do, by what the system said."""
    said = f"no checkpoint can be written to {run.path}: {problem}"
    fix = {
        errno.ENOSPC: f"It takes {size_text(total)}, {_free(run)} are free, and the one before stays until the next is "
        "whole. Free space, or choose another run.dir.",
        errno.EDQUOT: f"It takes {size_text(total)}. Free some of your quota, have it raised, or set another run.dir.",
        errno.EFBIG: "The limit on the size of a file is lower than that (`ulimit -f`). Raise it.",
        errno.EROFS: "Its file system is mounted read-only. Mount it for writing, or choose another run.dir.",
        errno.EACCES: "Give this user the right to write there, or choose another run.dir.",
        errno.EPERM: "Give this user the right to write there, or choose another run.dir.",
    }
    for number, text in fix.items():
        if os.strerror(number) in problem or (number == errno.ENOSPC and "disk is full" in problem):
            return UserError(f"{said}. {text} {_SWITCH}")
    return SaveError(f"{said}. Nothing was trained yet. {_SWITCH}")


def _free(run: RunDirectory) -> str:
    try:
        return size_text(shutil.disk_usage(run.path).free)
    except OSError:
        return "none"


def _lossy(run: RunDirectory, problem: str) -> str:
    return (
        f"{run.path}: a checkpoint was written there without an error and does not come back as it was: {problem}. "
        f"Its file system or this node's memory loses data: use another one. Nothing was trained yet. {_SWITCH}"
    )


def _agree(mine: Exception | None) -> None:
    """Raise the same on every rank when one of them has something to raise; collective."""
    found: list[Exception | None] = [mine]
    if dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    for error in found:  # that of rank 0 first, which knows what others told it
        if error is not None:
            raise error


def _sum(value: int, device: torch.device) -> float:
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()
