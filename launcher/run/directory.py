"""Where everything about one training lies; the layout is a contract (docs/run-directory.md)."""

from __future__ import annotations

import json
import platform
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.run.files import read_json, write_atomic

VERSION = 1  # of this layout


class RunDirectory:
    """Paths of one run; making the object touches nothing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.recipe_file = self.path / "recipe.yaml"
        self.plan_file = self.path / "plan.json"
        self.data_file = self.path / "data.json"
        self.run_file = self.path / "run.json"
        self.ledger_file = self.path / "ledger.jsonl"
        self.state_file = self.path / "state.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.control = self.path / "control"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.loss_png = self.path / "loss.png"

    @property
    def name(self) -> str:
        return self.path.name

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def exists(self) -> bool:
        """A run was made here; run.json is the last file that `create` writes."""
        return self.run_file.exists()

    def job(self, attempt: int) -> Path:
        """What was rendered for an attempt."""
        return self.path / "job" / f"attempt-{attempt}"

    def logs(self, attempt: int, node: str | None = None) -> Path:
        """Logs of an attempt, or of one of its nodes."""
        folder = self.path / "logs" / f"attempt-{attempt}"
        return folder if node is None else folder / node

    def log_file(self, attempt: int, node: str, rank: int) -> Path:
        """What one rank printed."""
        return self.logs(attempt, node) / f"{rank}.log"

    def checkpoint(self, step: int, attempt: int) -> Path:
        """Folder of one checkpoint."""
        return self.checkpoints / f"step-{step:08d}-a{attempt}"

    def create(self, recipe: dict[str, Any], plan: dict[str, Any], identity: dict[str, Any]) -> None:
        """Make the run: recipe, plan, then run.json, whose presence says that the run exists."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.control, self.checkpoints):
            folder.mkdir(exist_ok=True)
        self.write_recipe(recipe)
        self.write_plan(plan)
        facts = {
            "run_directory_version": VERSION,
            "run_id": uuid.uuid4().hex,
            "created": time.time(),
            "launcher": __version__,
            "python": platform.python_version(),
            "git": _git(),
            "identity": identity,
        }
        write_atomic(self.run_file, json.dumps(facts, indent=2) + "\n")

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """The resolved recipe; JSON is YAML, so ranks read it with the standard library."""
        write_atomic(self.recipe_file, json.dumps(recipe, indent=2) + "\n")

    def write_plan(self, plan: dict[str, Any]) -> None:
        """What follows from the recipe by arithmetic."""
        write_atomic(self.plan_file, json.dumps(plan, indent=2) + "\n")

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe; comment lines at its head are skipped."""
        lines = self.recipe_file.read_text(encoding="utf-8").split("\n")
        value: dict[str, Any] = json.loads("\n".join(line for line in lines if not line.startswith("#")))
        return value

    def read_json(self, name: str) -> dict[str, Any] | None:
        """One of the run's JSON files by name, as `data.json`; None when it is not there."""
        return read_json(self.path / name)

    def run_id(self) -> str:
        """The run's identity, kept in every checkpoint."""
        return str(json.loads(self.run_file.read_text())["run_id"])


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the current folder's repository; None outside one."""
    try:
        commit = _git_says("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_says("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
