"""The launch side starts without the libraries of training, on every path that a login node walks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "datasets", "ray", "deepspeed", "accelerate", "numpy"}
RECIPE = str(Path(__file__).parents[2] / "recipes" / "tiny-cpu.yaml")

PATHS = {
    "help": ["--help"],
    "version": ["--version"],
    "check": ["check", RECIPE],
    "check --json": ["check", RECIPE, "--json"],
    "show": ["show", RECIPE],
    "show --origin": ["show", RECIPE, "--origin"],
    "plan": ["plan", RECIPE],
    "plan --json": ["plan", RECIPE, "--json"],
    "render": ["render", RECIPE],
    "render for Slurm": ["render", RECIPE, "--target", "slurm", "run.dir=/shared/runs"],
    "check for Kubernetes": ["check", RECIPE, "--target", "kubernetes"],
    "submit of what is not there": ["submit", "nothing", "--target", "slurm"],
    "runs": ["runs"],
    "status": ["status", "nothing"],
    "a recipe that is wrong": ["check", RECIPE, "train.max_step=3"],
}
REFUSED = ("a recipe that is wrong", "check for Kubernetes", "submit of what is not there", "status")


def modules_after(argv: list[str], folder: Path) -> tuple[int, set[str]]:
    """Exit code, and names in sys.modules once a fresh interpreter has run the command line."""
    code = (
        "import sys; from launcher.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as exit: print('\\n', exit.code or 0, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True, cwd=folder)
    words = done.stderr.splitlines()[-1].split()
    return int(words[0]), set(words[1:])


@pytest.mark.parametrize("path", PATHS)
def test_no_training_library_is_imported(path: str, tmp_path: Path):
    code, modules = modules_after(PATHS[path], tmp_path)
    assert code == (2 if path in REFUSED else 0)
    assert "launcher.cli" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("module", ["launcher.recipe.schema", "launcher.run", "launcher.errors"])
def test_what_both_sides_share_is_standard_library_only(module: str):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"launcher", *sys.stdlib_module_names}
    assert "launcher" in done.stdout.split()
    unexpected = {name.partition(".")[0] for name in done.stdout.split()} - allowed
    assert {name for name in unexpected if not name.startswith(("_", "distutils"))} == set()


def test_help_and_check_import_no_omegaconf_or_rich(tmp_path: Path):
    for path in ("help", "check"):
        _, modules = modules_after(PATHS[path], tmp_path)
        assert not modules & {"omegaconf", "rich", "antlr4"}
