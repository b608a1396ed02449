"""Where everything about one training lies, and how the directory is made: a contract, see docs/run-directory.md."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.run.files import is_there, read_bytes, sync_folder, write_atomic
from launcher.run.provenance import provenance

RUN_DIRECTORY_VERSION = 1
MARKER = "COMMITTED"  # a checkpoint folder holds it once all else in there is durable
_RECIPE_HEADER = "# The resolved recipe, JSON below this line; `launcher resume RUN KEY=VALUE` changes it.\n"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run; the directory need not exist yet."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def data_file(self) -> Path:
        return self.path / "data.json"

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def watch_file(self) -> Path:
        return self.path / "watch.jsonl"

    @property
    def left_out_file(self) -> Path:
        return self.path / "left-out.jsonl"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def reserve(self) -> Path:
        """Space for the launcher's last words, while an attempt runs."""
        return self.control / ".reserve"

    def rank_reserve(self, rank: int) -> Path:
        """Space for a rank's outcome, while the rank runs."""
        return self.control / "outcome" / f".reserve-{rank}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def loss_png(self) -> Path:
        return self.path / "loss.png"

    def job(self, attempt: int) -> Path:
        """Folder of what was rendered for an attempt."""
        return self.path / "job" / f"attempt-{attempt}"

    def logs(self, attempt: int, node: str) -> Path:
        """Folder of one node's logs."""
        return self.path / "logs" / f"attempt-{attempt}" / node

    def log_file(self, attempt: int, node: str, rank: int) -> Path:
        """Everything a rank printed; `rank` counts over all nodes."""
        return self.logs(attempt, node) / f"{rank}.log"

    def checkpoint(self, step: int, attempt: int) -> Path:
        """Folder of the checkpoint that `attempt` wrote after `step` updates."""
        return self.checkpoints / checkpoint_name(step, attempt)

    def exists(self) -> bool:
        """Whether a run was made here; run.json is written last."""
        return is_there(self.run_file)

    def require_no_links(self) -> None:
        """What is written into a run stays in it; the run directory itself may be reached through a link.

        Raises:
            UserError: names in the directory, or in control/, that are symbolic links.
        """
        found = [
            path
            for folder in (self.path, self.control)
            if folder.is_dir() and not (folder != self.path and folder.is_symlink())
            for path in sorted(folder.iterdir())
            if path.is_symlink()
        ]
        if found:
            listed = "\n".join(f"  {path} -> {os.readlink(path)}" for path in found)
            raise UserError(
                f"{self.path}: symbolic links, through which the run would write elsewhere:\n{listed}\n"
                "Remove them. To keep a run on another disk, put the whole directory there by run.dir."
            )

    def create(self, recipe: dict[str, Any], plan: dict[str, Any], identity: dict[str, Any]) -> None:
        """Make the directory of a new run; the caller holds the lease.

        Args:
            recipe: resolved recipe
            identity: what makes it this run, by dotted key; kept in run.json beside run id, versions and git commit
        Raises:
            OSError: it cannot be written.
        """
        for folder in (self.path, self.control, self.checkpoints, self.path / "logs", self.path / "job"):
            folder.mkdir(parents=True, exist_ok=True)
        self.write_recipe(recipe)
        self.write_plan(plan)
        record = {"run_directory_version": RUN_DIRECTORY_VERSION, **provenance(), "identity": identity}
        write_atomic(self.run_file, json.dumps(record, indent=2) + "\n")
        self._name_durably()

    def _name_durably(self) -> None:
        """Sync the folders above, which may have been made for this run just before."""
        here = self.path.resolve()
        for above in here.parents:
            if os.stat(above).st_dev != os.stat(here).st_dev or not os.access(above, os.R_OK | os.W_OK):
                break  # nothing was made there
            sync_folder(above)

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Replace recipe.yaml."""
        write_atomic(self.recipe_file, _RECIPE_HEADER + json.dumps(recipe, indent=2) + "\n")

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Replace plan.json."""
        write_atomic(self.plan_file, json.dumps(plan, indent=2) + "\n")

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe.

        Raises:
            UserError: it was edited into YAML that is no JSON.
        """
        lines = read_bytes(self.recipe_file).decode().splitlines()
        text = "\n".join("" if line.lstrip().startswith("#") else line for line in lines)  # keeps line numbers
        return self._parse(self.recipe_file, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run by its name, as `data.json`.

        Raises:
            FileNotFoundError: it is not there; UserError: it is damaged, or run.json is of a newer launcher.
        """
        values = self._parse(self.path / name, read_bytes(self.path / name).decode(errors="replace"))
        version = values.get("run_directory_version", RUN_DIRECTORY_VERSION)
        if name == self.run_file.name and version > RUN_DIRECTORY_VERSION:
            raise UserError(
                f"{self.path}: run directory version {version}: expected at most {RUN_DIRECTORY_VERSION}. "
                "It was made by a newer launcher; use that one."
            )
        return values

    def _parse(self, path: Path, text: str) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}). Files of a run are not edited by hand.") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}.")
        return values


def checkpoint_name(step: int, attempt: int) -> str:
    """`step-00000500-a3`"""
    return f"step-{step:08d}-a{attempt}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder's name, None if it is no such name."""
    match = re.fullmatch(r"step-(\d{8,})-a([1-9]\d*)", name)
    return (int(match[1]), int(match[2])) if match else None
