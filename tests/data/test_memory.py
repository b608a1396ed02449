"""Memory while preparing does not grow with the text; the long form is benchmarks/prepare_memory.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.matrix
def test_text_is_prepared_in_less_memory_than_it_has(tmp_path):
    command = [sys.executable, "benchmarks/prepare_memory.py", "--gb", "0.6", "--limit-mb", "512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "private memory at most" in done.stdout
