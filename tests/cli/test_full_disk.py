"""L7: a disk that is full in mid-run, a real one (a small tmpfs): the run goes on, says so, and is whole in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.run.control import read_outcomes, read_verdict
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests.jobs.make import finish, launcher, losses, project, ranks_of, until

pytestmark = pytest.mark.gloo

STEPS = 300


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Heard:
    """What a process says, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._threads = [threading.Thread(target=self._hear, args=(pipe,)) for pipe in (process.stdout, process.stderr)]
        for thread in self._threads:
            thread.start()

    def _hear(self, pipe) -> None:
        for line in pipe:
            self.lines.append(line)
        pipe.close()

    def text(self) -> str:
        return "".join(self.lines)

    def end(self, process: subprocess.Popen[str], *, code: int) -> str:
        assert process.wait(240) == code, self.text()
        for thread in self._threads:
            thread.join()
        return self.text()


def fill(disk: Path) -> Path:
    """A file that leaves no byte free."""
    file = disk / "filler"
    with open(file, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            pass
    assert os.statvfs(disk).f_bavail == 0
    return file


def filled_in_mid_run(
    disk: Path, project_folder: Path
) -> tuple[subprocess.Popen[str], Heard, RunDirectory, Path, list[int]]:
    """A process, what it says, its run, the filler, its ranks, which stand still until SIGCONT: no byte is free."""
    checkpoint = {"every_steps": 20, "async_save": True, "keep_last": 2, "rehearse": False}
    recipe = project(project_folder, train={"max_steps": STEPS}, checkpoint=checkpoint)
    process = launcher("run", recipe, f"run.dir={disk}")
    heard = Heard(process)
    run = RunDirectory(disk / "tiny")
    until("a checkpoint", lambda: valid_checkpoints(run) or process.poll() is not None)
    assert process.poll() is None, heard.text()
    ranks = ranks_of(process.pid)
    send(ranks, signal.SIGSTOP)
    return process, heard, run, fill(disk), ranks


def send(ranks: list[int], number: signal.Signals) -> None:
    for pid in ranks:
        os.kill(pid, number)


def test_l7_a_run_on_a_full_disk_goes_on_says_so_and_is_whole_once_there_is_space(disk: Path, tmp_path: Path):
    process, heard, run, filler, ranks = filled_in_mid_run(disk, tmp_path / "project")
    before = valid_checkpoints(run)[-1].step
    send(ranks, signal.SIGCONT)
    until("a warning", lambda: "metrics.jsonl cannot be written" in heard.text() or "its log cannot" in heard.text())
    assert "No space left on device" in heard.text()
    filler.unlink()
    text = heard.end(process, code=0)
    assert "Traceback" not in text
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]  # each one whole
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    newest = valid_checkpoints(run)[-1]
    assert (newest.step, read_state(run).status, read_verdict(run)) == (STEPS, "finished", "stop")
    assert newest.step > before
    assert not list(run.control.rglob(".reserve*"))


def test_l7_a_disk_that_stays_full_ends_with_1_its_reason_and_the_old_checkpoint(disk: Path, tmp_path: Path):
    process, heard, run, filler, ranks = filled_in_mid_run(disk, tmp_path / "project")
    before = [ref.path.name for ref in valid_checkpoints(run)]
    process.send_signal(signal.SIGTERM)  # the last checkpoint is due at once
    until("the request", lambda: (run.control / "stop-request").exists())
    send(ranks, signal.SIGCONT)
    text = heard.end(process, code=1)
    assert "Traceback" not in text
    assert text.count("no checkpoint could be written in 4 tries") == 1
    assert "No space left on device" in text
    assert [ref.path.name for ref in valid_checkpoints(run)] == before
    assert (attempts(run)[-1].end_class, read_verdict(run), read_state(run).status) == ("node", "requeue", "failed")
    assert {outcome.failure_class for outcome in read_outcomes(run, 1).values()} == {"node"}

    filler.unlink()
    finish(launcher("resume", run.path), code=0)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
