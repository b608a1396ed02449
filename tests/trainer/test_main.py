"""One rank's whole life: under plain torchrun, its log, its signals, its outcome whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run.control import read_outcomes
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from launcher.trainer import main
from launcher.trainer.preload import modules
from tests.trainer import make


def torchrun(run: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """`torchrun -m launcher.trainer RUN`, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*command, "-m", "launcher.trainer", str(run)], capture_output=True, text=True, timeout=240)


@pytest.mark.gloo
def test_plain_torchrun_trains_a_prepared_run_and_keeps_its_ledger(tmp_path: Path) -> None:
    run = make.make_run(tmp_path, make.make_recipe("fsdp2"), total_steps=3)
    done = torchrun(run.path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 3/3" in done.stdout
    (attempt,) = attempts(run)
    assert (attempt.target, attempt.ended, attempt.end_step) == ("torchrun", True, 3)
    assert [c.step for c in valid_checkpoints(run)] == [3]
    assert read_state(run).status == "finished"

    again = torchrun(run.path, 2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("is finished") == 1
    assert len(attempts(run)) == 1


@pytest.mark.gloo
@pytest.mark.parametrize(("prepared", "words"), [(False, "no run lies there"), (True, "its data is not prepared")])
def test_where_no_prepared_run_lies_a_rank_says_so_in_one_line_and_ends_with_2(tmp_path, prepared, words) -> None:
    if prepared:
        make.make_run(tmp_path, make.make_recipe()).data_file.unlink()
    command = [sys.executable, "-m", "launcher.trainer", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "ledger.jsonl" not in [path.name for path in tmp_path.rglob("*")]


@pytest.mark.gloo
def test_plain_torchrun_fails_and_says_so_when_the_recipe_is_wrong(tmp_path: Path) -> None:
    run = make.make_run(tmp_path, make.make_recipe(model__attention="flash_attention_2"), total_steps=3)
    done = torchrun(run.path, 1)
    assert done.returncode == 1
    assert "model.attention = flash_attention_2: needs a GPU. Usable here: auto, sdpa, eager." in done.stderr
    outcome = read_outcomes(run, 1)[0]
    assert (outcome.kind, outcome.failure_class) == ("failed", "user")
    assert read_state(run).status == "failed"


def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, int]:
    """A failing rank in a process of its own, so that neither its output nor its signals touch the tests."""
    run = make.make_run(tmp_path, make.make_recipe(), total_steps=3)
    run.data_file.unlink()
    code = f"from launcher.trainer.main import run_rank; run_rank({str(run.path)!r}, 4)"
    environment = {**os.environ, "LAUNCHER_LOG": "1", "LAUNCHER_NODE": "n7", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr, run.log_file(4, "n7", 0).read_text(), done.returncode


@pytest.mark.gloo
def test_a_ranks_output_goes_to_its_log_with_the_traceback_and_the_process_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, logged, code = alone(tmp_path, monkeypatch)
    assert code != 0
    assert shown == ""
    assert "data.json: missing, so the data is not prepared" in logged
    assert "Traceback" in logged
    outcome = json.loads((tmp_path / "run" / "control" / "outcome" / "4-0.json").read_text())
    assert (outcome["kind"], outcome["failure_class"], outcome["node"]) == ("failed", "user", "n7")


def test_sigterm_and_sigusr1_only_set_a_flag_and_ctrl_c_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    run = make.make_run(tmp_path, make.make_recipe(), total_steps=3)
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            main.listen_for_signals()
            assert not main.stop_asked(run, 1)
            os.kill(os.getpid(), number)
            assert main.stop_asked(run, 1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_is_preloaded_starts_no_thread_and_joins_no_group() -> None:
    code = (
        "import importlib, threading, os\n"
        "os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        f"for name in {modules('zero3', 'cpu')!r}: importlib.import_module(name)\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
