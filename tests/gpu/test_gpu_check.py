"""The GPU check on a machine without one: it runs, its table is whole, a failing or missing part stops no other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]

# what a machine with torch, transformers, accelerate and peft alone does not have
WITHOUT = """
import importlib.machinery
finder = importlib.machinery.PathFinder
found = finder.find_spec
names = {"omegaconf", "datasets", "numba", "xxhash", "matplotlib", "pyarrow", "deepspeed", "liger_kernel"}
finder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] in names else found(name, *rest))
"""


def check(*words: str, out: Path, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Run the script on tiny models; the rows it wrote."""
    command = [sys.executable, "benchmarks/gpu_check.py", "--cpu", "--together", "--out", str(out), *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["cpu_only"]
    assert result["date"]
    assert result["versions"]["torch"]
    return list(result["rows"])


@pytest.mark.gloo
def test_the_check_itself_runs_on_tiny_models_on_a_cpu(tmp_path: Path) -> None:
    names = [name for name in gpu_check.NAMES if name != "attention-speed"]
    rows = check("--only", *names, out=tmp_path / "out.json")
    assert {row["check"] for row in rows} == set(names)
    ok = [f"{row['check']} {row['case']}" for row in rows if row["status"] == "ok"]
    for expected in (
        "attention sdpa bf16", "attention eager bf16", "parity fsdp2 fp32", "parity zero1 fp32", "parity zero2 fp32",
        "parity zero3 fp32", "checkpoint ddp to fsdp2", "checkpoint fsdp2 to zero1", "checkpoint zero1 to ddp",
        "activations selective", "activations full", "activations offload", "speed tiny 256 fsdp2",
        "faults F36 oom", "faults F36 nccl",
    ):  # fmt: skip
        assert expected in ok
    skipped = {f"{row['check']} {row['case']}": row["text"] for row in rows if row["status"] == "skipped"}
    assert skipped["attention varlen bf16"].endswith("needs a GPU")
    assert "its kernels need a GPU" in skipped["liger all"]


@pytest.mark.gloo
def test_packages_that_a_bare_gpu_machine_lacks_are_named_and_stop_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {"PYTHONPATH": str(tmp_path)}
    rows = check("--only", "parity", "checkpoint", out=tmp_path / "out.json", environment=environment)
    said = {f"{row['check']} {row['case']}": (row["status"], row["text"]) for row in rows}
    assert said["parity fsdp2 fp32"][0] == "ok"
    assert said["parity zero3 fp32"] == ("skipped", "deepspeed is not installed")
    assert said["checkpoint all"] == ("skipped", "xxhash is not installed")


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"cpu": True, "quick": True, "together": True, "out": None, **changes})


def test_a_check_that_raises_is_a_failed_row_after_those_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_parts import Row

    def half(name: str, options: argparse.Namespace) -> Iterator[Row]:
        yield Row("parity", "ddp", "ok", "")
        raise RuntimeError("an illegal memory access\nlong text")

    monkeypatch.setattr(gpu_check, "run", half)
    rows = gpu_check.checked("parity", options())
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert rows[1]["text"] == "RuntimeError: an illegal memory access"


def test_a_check_that_lacks_a_module_is_skipped_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str, options: argparse.Namespace) -> Any:
        raise ModuleNotFoundError("No module named 'peft'")

    monkeypatch.setattr(gpu_check, "run", lacking)
    (row,) = gpu_check.checked("parity", options())
    assert (row["status"], row["text"]) == ("skipped", "No module named 'peft'")


def test_a_check_whose_process_dies_is_a_failed_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os, signal\nprint('CUDA error', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    (row,) = gpu_check.checked_apart("speed", options())
    assert (row["status"], row["text"]) == ("failed", "its process ended with -11: CUDA error")


def test_without_a_gpu_the_check_says_so_and_ends_with_2() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "sees no GPU here. --cpu tries the check itself" in done.stderr


def test_a_difference_above_its_tolerance_fails_and_is_shown() -> None:
    from benchmarks.gpu_parts import judged

    assert judged("a", "b", {"loss": (1e-6, 1e-5)}).status == "ok"
    row = judged("a", "b", {"loss": (1e-6, 1e-5), "gradient": (float("nan"), 1e-2)})
    assert row.status == "failed"
    assert "gradient nan (<= 1e-02)" in row.text
