"""Inside every rank of a lane's fork server: writes down which rows it takes, and raises a signal in a chosen phase.

Both in the folder that `LAUNCHER_TEST_ROWS` names. Rows go to a file that is named by the attempt, as torch's agent
calls it. A file `signal` says `{"run", "phase", "step", "rank", "to"}`: when that rank of the run directory `run` has
made so many updates in its process and is inside that phase, SIGTERM goes to its own process (`rank`) or to the
launcher, and the file goes. In the second case the rank stays in the phase until the launcher has asked for a stop.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from launcher.data.batches import Batches
from launcher.jobs.tether import PARENT
from launcher.trainer.checkpoint import saving

PHASES = ("data", "forward", "backward", "optimizer", "save")

_folder = os.environ.get("LAUNCHER_TEST_ROWS", "")
_updates = 0
_step_of, _write_file = Batches.step, saving.write_file


def _in(phase: str) -> None:
    """Raise the signal that is asked for here."""
    asked_file = os.path.join(_folder, "signal")
    attempt = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if not attempt or not os.path.exists(asked_file):
        return
    try:
        with open(asked_file) as file:
            asked = json.load(file)
    except (OSError, ValueError):  # another rank has just taken it away
        return
    name = os.path.basename(asked["run"])
    here = attempt.rpartition("-a")[0] == name and os.environ["RANK"] == str(asked["rank"])
    if here and asked["phase"] == phase and _updates >= asked["step"]:
        os.rename(asked_file, asked_file + "ed")
        if asked["to"] == "rank":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        os.kill(int(os.environ[PARENT]), signal.SIGTERM)
        request, until = os.path.join(asked["run"], "control", "stop-request"), time.monotonic() + 60
        while not os.path.exists(request) and time.monotonic() < until:
            time.sleep(0.01)


def _step(self: Any, step: int) -> Any:
    batch = _step_of(self, step)
    if _folder and "TORCHELASTIC_RUN_ID" in os.environ:
        rows = [row for micro in batch.micro for row in micro.rows]
        line = json.dumps({"step": step, "rank": int(os.environ["RANK"]), "rows": rows})
        path = os.path.join(_folder, os.environ["TORCHELASTIC_RUN_ID"])
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(handle, line.encode() + b"\n")  # one write, so a kill leaves whole lines
        os.close(handle)
        _in("data")
    return batch


def _written(*arguments: Any, **more: Any) -> Any:
    _in("save")
    return _write_file(*arguments, **more)


def _forward(module: Any, arguments: Any, output: Any) -> None:
    if isinstance(module, torch.nn.Linear):
        _in("forward")
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: _in("backward"))


def _before_update(*_: Any) -> None:
    _in("optimizer")


def _after_update(*_: Any) -> None:
    global _updates
    _updates += 1


Batches.step = _step  # type: ignore[method-assign]
saving.write_file = _written
register_module_forward_hook(_forward)
register_optimizer_step_pre_hook(_before_update)
register_optimizer_step_post_hook(_after_update)
