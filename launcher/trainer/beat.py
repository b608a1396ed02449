"""A rank's side of the watch: its beats, its pace, and what it tells when its node's watch asks where it stands.

Without the folder that the launcher names in the environment (plain torchrun, tests) nothing is written or listened to.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.run.heartbeat import ENVIRONMENT, GROUP, PHASES, Heart, Pace

if TYPE_CHECKING:
    from launcher.trainer.own_time import OwnTime

# real-time signals belong to nobody; faulthandler answers inside of the handler, also while C code holds Python's lock
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + (7 if hasattr(signal, "SIGRTMIN") else 0)
RECORDER = "TORCH_FR_BUFFER_SIZE"  # torch's flight recorder of collectives, of gloo and NCCL
_NUMBER = {name: number for number, name in enumerate(PHASES)}
_LAST_COLLECTIVES = 16

_heart: Heart | None = None
_step = 0


def begin(rank: int) -> None:
    """Make this rank's heartbeat, where the launcher asks for one, and be ready to tell where it stands."""
    global _heart
    if not (folder := os.environ.get(ENVIRONMENT)):
        return
    os.environ.setdefault(RECORDER, "2000")
    place = Path(folder)
    faulthandler.register(DUMP_SIGNAL, file=open(stack_file(place, rank), "w"), all_threads=True)  # noqa: SIM115
    os.mkfifo(asking_file(place, rank), 0o600)
    asked = os.open(asking_file(place, rank), os.O_RDWR)  # both ends, so that it is never closed for us
    threading.Thread(target=_answer, args=(asked, answer_file(place, rank)), name="watch", daemon=True).start()
    _heart = Heart(place, rank)


def beat(phase: str, step: int | None = None) -> None:
    """Say what this rank does from now on; half a microsecond.

    phase: one of `PHASES`; step: optimizer steps finished, None: as before
    """
    global _step
    if step is not None:
        _step = step
    if _heart is not None:
        _heart.beat(_NUMBER[phase], _step)


def is_watched() -> bool:
    """Whether anybody reads what is told here."""
    return _heart is not None


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank's threads are written at `DUMP_SIGNAL`."""
    return folder / f"{rank}.stack"


def asking_file(folder: Path, rank: int) -> Path:
    """A pipe: each byte asks the rank for its last collectives."""
    return folder / f"{rank}.ask"


def answer_file(folder: Path, rank: int) -> Path:
    """Where it answers: a list of the last collectives of each process group."""
    return folder / f"{rank}.answer"


class PaceKeeper:
    """Counts this rank's own time over `GROUP` steps and leaves it where the watch reads it.

    Args:
        own: what measures it; None where no layer can be measured
    """

    def __init__(self, own: OwnTime | None) -> None:
        self._own, self._group, self._wait_s, self._steps = own, -1, 0.0, 0
        self._since = time.perf_counter()

    def step(self, step: int, wait_s: float) -> None:
        """A step is done: the number of steps finished, and how long it waited for its rows."""
        if _heart is None:
            return
        if self._own is not None:
            self._own.step()
        self._wait_s += wait_s
        self._steps += 1
        if step // GROUP == self._group:
            return
        now, begun = time.perf_counter(), self._group >= 0
        if begun:  # the first one is not whole
            own_s = self._own.taken() if self._own is not None else 0.0
            _heart.pace(self._group, Pace(own_s, self._wait_s / self._steps, (now - self._since) / self._steps))
        elif self._own is not None:
            self._own.taken()
        self._group, self._wait_s, self._steps, self._since = step // GROUP, 0.0, 0, now


def _answer(asked: int, answer: Path) -> None:
    """A thread that sleeps in a read until the watch asks."""
    while os.read(asked, 1):
        try:
            said: Any = last_collectives()
        except Exception as error:  # a recorder that another torch has no more
            said = {"error": f"{type(error).__name__}: {error}"}
        fresh = answer.with_suffix(".fresh")
        fresh.write_text(json.dumps(said))
        fresh.replace(answer)


def last_collectives() -> list[dict[str, Any]]:
    """The last collectives of this rank's process groups, oldest first, as torch's flight recorder has them."""
    if "torch" not in sys.modules:  # then there were none, and now is no time for its import
        return []
    from torch._C import _distributed_c10d

    found = json.loads(_distributed_c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    return [
        {
            "group": entry["process_group"][0], "number": entry["collective_seq_id"], "name": entry["profiling_name"],
            "sizes": entry["input_sizes"], "done": entry["retired"] or entry["state"] == "completed",
        }
        for entry in found.get("entries", [])[-_LAST_COLLECTIVES:]
    ]  # fmt: skip
