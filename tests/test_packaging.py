"""What is in the wheel, what the base install needs, and that the constraints satisfy the ranges."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


def test_every_constraint_is_an_exact_public_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert constraints()["torch"] == "2.13.0"


@pytest.mark.parametrize("extra", ["base", "train", "deepspeed", "ray", "kubernetes", "trackers", "dev"])
def test_the_installed_extras_are_pinned_inside_their_ranges(extra: str):
    pinned = constraints()
    listed = PROJECT["dependencies"] if extra == "base" else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, listed):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not admit {pinned[name]}"


def test_the_base_install_has_no_training_library():
    names = {Requirement(text).name.lower() for text in PROJECT["dependencies"]}
    assert not names & {"torch", "transformers", "datasets", "accelerate", "deepspeed", "ray", "numpy"}


@pytest.mark.slow
def test_the_wheel_carries_recipes_configs_and_slurm(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("train_launcher-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "configs", "slurm"):
        tracked = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()]
        assert tracked
        assert {f"launcher/shipped/{path}" for path in tracked} <= names
    assert "launcher/demo/recipe.yaml" in names
