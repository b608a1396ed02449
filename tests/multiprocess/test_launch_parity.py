"""However the ranks are started - `launcher run`, torchrun, Accelerate with a shipped file - losses are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run.state import reached_end
from launcher.shipped import folder
from tests.jobs.make import finish, launcher, losses, project, run_of

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

STRATEGIES = ("ddp", "fsdp2", "zero2")
RUN = {"precision": "auto", "max_steps": 3, "global_batch_size": 8}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """One recipe a strategy over the same data; `launcher run` has trained each, which also prepared the rows."""
    base = project(
        tmp_path_factory.mktemp("parity"), train=RUN, checkpoint={"every_steps": None},
        model={"gradient_checkpointing": "full"},  # as the shipped files for fsdp2 have it
    )  # fmt: skip
    found = {}
    for kind in STRATEGIES:
        values = json.loads(base.read_text())
        values["strategy"] = {"kind": kind}
        found[kind] = _write(base.parent / f"{kind}.yaml", values, name=f"{kind}-launcher")
    pytest.importorskip("deepspeed")
    for kind, recipe in found.items():
        finish(launcher("run", recipe), code=0)
        assert len(losses(run_of(recipe, f"{kind}-launcher"))) == 3
    return found


def _write(file: Path, values: dict, *, name: str) -> Path:
    values["run"]["name"] = name
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize(("starter", "kind"), [("torchrun", "ddp"), *(("accelerate", kind) for kind in STRATEGIES)])
def test_losses_are_those_of_launcher_run(starter, kind, recipes):
    name = f"{kind}-{starter}"
    values = json.loads(recipes[kind].read_text())
    recipe = _write(recipes[kind].with_name(f"{name}.yaml"), values, name=name)
    _start([sys.executable, "-m", "launcher.jobs.begin", recipe], recipe.parent)
    run = run_of(recipe, name)
    if starter == "torchrun":
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    else:
        file = folder("configs") / "accelerate" / f"{kind}.yaml"
        command = ["accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    _start([sys.executable, "-m", *command, "-m", "launcher.trainer", run.path], recipe.parent)
    assert losses(run) == losses(run_of(recipe, f"{kind}-launcher"))
    assert reached_end(run)
    assert json.loads(run.ledger_file.read_text().splitlines()[0])["target"] == starter


def _start(command: list, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
