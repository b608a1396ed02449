"""Counting GPUs without torch, and sharing cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.jobs import devices


@pytest.fixture
def four_gpus(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,1", 2), ("", 0), ("3", 1), ("0,-1,2", 1), ("GPU-aa,GPU-bb", 2), ("0,1,2,3,4,5", 4)],
)
def test_device_files_are_counted_and_cuda_visible_devices_narrows_them(four_gpus, visible, count):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert devices.count_gpus(environment, four_gpus)[0] == count


def test_nvidia_smi_is_asked_where_there_are_no_device_files(tmp_path: Path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-a)'\necho 'GPU 1: H200 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "dev").mkdir()
    assert devices.count_gpus({}, tmp_path / "dev") == (2, "nvidia-smi -L")


def test_auto_without_a_gpu_takes_the_cpu_and_says_why(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: (0, "no device files"))
    assert devices.accelerator("auto", 1) == ("cpu", "no GPU here (no device files)")


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_more_ranks_than_cores_are_warned_of_and_not_refused(monkeypatch, wanted):
    monkeypatch.setattr(devices, "count_gpus", lambda: (0, "made up"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert devices.accelerator(wanted, 64)[1].endswith("; warning: 64 ranks share 2 cores")
    assert "warning" not in devices.accelerator(wanted, 2)[1]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_fewer_gpus_than_ranks_is_refused_with_the_number_that_fits(monkeypatch, wanted):
    monkeypatch.setattr(devices, "count_gpus", lambda: (2, "made up"))
    assert devices.accelerator(wanted, 2)[0] == "cuda"
    with pytest.raises(UserError, match=r"nproc_per_node = 4.*at most 2.*nproc_per_node=2"):
        devices.accelerator(wanted, 4)


def test_cuda_without_any_gpu_is_refused_and_the_cpu_named(monkeypatch):
    monkeypatch.setattr(devices, "count_gpus", lambda: (0, "made up"))
    with pytest.raises(UserError, match=r"accelerator=cpu"):
        devices.accelerator("cuda", 1)


def test_cores_are_shared_among_ranks_unless_the_person_said_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [devices.threads_per_rank(ranks) for ranks in (1, 2, 5, 16)] == [12, 6, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert devices.threads_per_rank(2) == 3
