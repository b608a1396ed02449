"""From the kill of a rank to the next training step on 2 CPU ranks: the launcher against torchrun's own restart.

The launcher restarts the ranks in the job (a new attempt from the newest checkpoint, ranks from the warm fork server);
`torchrun --max-restarts` restarts a hand-written script that imports the same libraries, trains the same tiny model and
loads its newest checkpoint. torchrun has its best case: the other rank's connection breaks, it fails at once by itself,
and torchrun's 30 s for ranks that do not heed SIGTERM are never waited for. Kills alternate between both, so that a
busy machine is fair; the ranks of the one that waits are stopped meanwhile. Prints the seconds of each and the ratio
(goal: 0.5 or less). The launcher's first step counts when its figures are written, while its second step runs.

    python benchmarks/restart.py [--kills 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from startup import BIN, ENVIRONMENT, LAUNCHER, MODEL, make_project

PATIENCE_S = 600.0

# what a person would write: imports, model, newest checkpoint, steps with a checkpoint each, a line for each step
SCRIPT = """
import importlib, json, os, sys, time
from launcher.trainer.preload import MODULES
for name in MODULES:
    importlib.import_module(name)
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1])))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
file, step = f"{sys.argv[2]}/{rank}.pt", 0
if os.path.exists(file):
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
ids = torch.randint(0, 400, (2, 128))
while True:
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if rank == 0:
        line = {"step": step, "time": time.time(), "pid": os.getpid()}
        with open(f"{sys.argv[2]}/steps.jsonl", "a") as steps:
            steps.write(json.dumps(line) + "\\n")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file + ".new")
    dist.barrier()
    os.replace(file + ".new", file)
    time.sleep(0.2)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5, help="of each, alternating")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Launcher(folder) as ours, Torchrun(folder, kills) as theirs:
            pairs = []
            for number in range(kills):
                with theirs.stopped():
                    a = ours.restart()
                with ours.stopped():
                    b = theirs.restart()
                pairs.append((a, b))
                print(f"kill {number + 1}: launcher {pairs[-1][0]:.2f} s, torchrun {pairs[-1][1]:.2f} s", flush=True)
    a, b = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = statistics.median(x / y for x, y in pairs)
    print(f"kill of a rank to the next step, 2 ranks: {a:.2f} s, torchrun's own restart {b:.2f} s")
    print(f"ratio, median of pairs: {ratio:.2f} (goal 0.5 or less)")


class Running:
    """Training that goes on for ever; `restart` kills its rank 1 and waits for a step of new ranks."""

    def __init__(self, command: list[str]) -> None:
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **quiet)

    def __enter__(self) -> Running:
        self._until(lambda: len(self.lines()) >= 3)
        return self

    def __exit__(self, *_: object) -> None:
        below = descendants(self._process.pid)
        self._process.kill()
        self._process.wait()
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The ranks stand still, so that they take nothing from the other."""
        ranks = self.ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        yield
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)

    def lines(self) -> list[dict[str, Any]]:
        """Of every step so far: its time, and what tells the ranks' lives apart."""
        raise NotImplementedError

    def ranks(self) -> list[int]:
        """Process ids of the ranks that train now."""
        raise NotImplementedError

    def restart(self) -> float:
        """Seconds from the kill to the first step after it."""
        before = self.lines()[-1]["life"]
        self._until(lambda: len([line for line in self.lines() if line["life"] == before]) >= 3)
        victim = self.ranks()[-1]
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        self._until(lambda: self.lines()[-1]["life"] != before)
        lines = self.lines()
        last = max(number for number, line in enumerate(lines) if line["life"] == before)
        return float(lines[last + 1]["time"]) - killed

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{type(self).__name__} does not go on (code {self._process.poll()})")
            time.sleep(0.01)


class Launcher(Running):
    """`launcher run`, a checkpoint every step, no limit to restarts."""

    def __init__(self, folder: Path) -> None:
        recipe = make_project(folder)
        changes = [
            "run.name=restart", "train.max_steps=1000000", "checkpoint.every_steps=1", "checkpoint.keep_last=2",
            "checkpoint.rehearse=false", "cluster.restart.unknown=1000", "cluster.restart.communication=1000",
            "cluster.restart.backoff_s=0", "logging.every_steps=1",
        ]  # fmt: skip
        self._metrics = folder / "runs" / "restart" / "metrics.jsonl"
        super().__init__([*LAUNCHER, "run", str(recipe), *changes])

    def lines(self) -> list[dict[str, Any]]:
        found = [line for line in read(self._metrics) if "loss" in line]
        return [{"time": line["time"], "life": line["attempt"]} for line in found]

    def ranks(self) -> list[int]:
        children = [pid for pid in descendants(self._process.pid) if parent_of(pid) != self._process.pid]
        return sorted(children)[:2]


class Torchrun(Running):
    """torchrun with restarts of its own."""

    def __init__(self, folder: Path, kills: int) -> None:
        script, self._steps = folder / "train.py", folder / "torchrun" / "steps.jsonl"
        self._steps.parent.mkdir()
        script.write_text(SCRIPT)
        options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={kills + 1}"]
        words = [str(script), json.dumps(MODEL), str(self._steps.parent)]
        super().__init__([str(BIN / "torchrun"), *options, *words])

    def lines(self) -> list[dict[str, Any]]:
        return [{"time": line["time"], "life": line["pid"]} for line in read(self._steps)]

    def ranks(self) -> list[int]:
        return sorted(pid for pid in descendants(self._process.pid) if parent_of(pid) == self._process.pid)


def read(file: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file that is being written."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line.endswith("}")]


def parent_of(pid: int) -> int | None:
    """None if it has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def descendants(parent: int) -> list[int]:
    """Every process below one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (above := parent_of(int(entry.name))) is not None:
            children.setdefault(above, []).append(int(entry.name))
    below, new = [], [parent]
    while new:
        new = [child for pid in new for child in children.get(pid, [])]
        below += new
    return below


if __name__ == "__main__":
    main()
