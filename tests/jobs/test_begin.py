"""The command line of `python -m launcher.jobs.begin`: a recipe, in jobs of several nodes HOST:PORT, and changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.jobs.begin import read

READ = [
    (["r.yaml"], (Path("r.yaml"), None, [])),
    (["r.yaml", "node0:29400"], (Path("r.yaml"), "node0:29400", [])),
    (["r.yaml", "run.name=acc", "strategy=zero2"], (Path("r.yaml"), None, ["run.name=acc", "strategy=zero2"])),
    (["r.yaml", "run.name=acc", "node0:29400"], (Path("r.yaml"), "node0:29400", ["run.name=acc"])),
]


@pytest.mark.parametrize(("arguments", "expected"), READ)
def test_changes_are_told_from_the_address_by_their_equals_sign(arguments, expected):
    assert read(arguments) == expected


@pytest.mark.parametrize("arguments", [[], ["run.name=acc"], ["r.yaml", "node0:1", "node1:1"]])
def test_anything_else_is_answered_with_what_is_taken(arguments):
    with pytest.raises(UserError, match=r"expected RECIPE \[HOST:PORT\] \[KEY=VALUE \.\.\.\], got"):
        read(arguments)


def test_a_wrong_change_ends_with_code_2_and_names_the_key(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny-cpu.yaml"
    command = [sys.executable, "-m", "launcher.jobs.begin", str(recipe), "run.nam=acc"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "run.nam" in done.stderr
    assert "Did you mean run.name?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
