"""Everything that needs a CUDA device: each check of `make gpu-check`, in its short form."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import gpu_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; `make gpu-check` on one runs these"),
]


@pytest.mark.parametrize("name", gpu_check.NAMES)
def test_no_row_of_the_gpu_check_fails(name: str) -> None:
    options = argparse.Namespace(cpu=False, quick=True)
    rows = gpu_check.checked_apart(name, options)
    assert rows
    assert [gpu_check.line(row) for row in rows if row["status"] == "failed"] == []
