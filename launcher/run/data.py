"""data.json: what a run's data are, as `prepare` found them; its version, and what of it a person should know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.run.directory import RunDirectory

VERSION = 2


def is_current(data: Mapping[str, Any]) -> bool:
    """Whether this launcher laid the rows that it tells of."""
    return data.get("version") == VERSION


def require_current(run: RunDirectory, data: Mapping[str, Any]) -> None:
    """Refuse to go on with rows that another version of the launcher laid.

    Raises:
        UserError: says how to go on.
    """
    if not is_current(data):
        raise UserError(
            f"{run.data_file}: version {data.get('version')}, expected {VERSION}: its data were prepared by another "
            "version of the launcher, which lays rows differently. Finish the run with that version (see "
            "launcher_version in run.json), start another run with run.name=..., or go on from its last checkpoint "
            "with rows laid anew: --force."
        )


def stores(data: Mapping[str, Any]) -> list[Path]:
    """Folders of the stores that ranks open."""
    entries = [*data["train"]["sources"], *(data["eval"] or {"sets": []})["sets"]]
    return [Path(entry["store"]) for entry in entries if "store" in entry]  # what is streamed has none


def epoch_rows(data: Mapping[str, Any]) -> int:
    """Rows of one epoch, in any version."""
    train = data["train"]
    return int(train["epoch_rows"] if is_current(data) else train["rows"])


def remarks(data: Mapping[str, Any]) -> Iterator[str]:
    """What was lost, repaired or looks wrong, a line each; by source where there are several."""
    for role, entry in (("train", data["train"]), ("eval", data["eval"] or {})):
        yield from (f"{role}: warning: {line}" for line in entry.get("warnings", ()))
        parts = entry.get("sources" if role == "train" else "sets", [])
        for part in parts:
            name = f"{role} {part['name']}" if len(parts) > 1 else role
            for what in ("dropped", "changed"):
                yield from (f"{name}: {what}: {n:,} ({reason})" for reason, n in part.get(what, {}).items())
    if duplicates := data["train"].get("duplicates"):
        yield f"train: {duplicates:,} of {_records(data['train']):,} records have the text of an earlier one"
    for name, leaked in data["leaked"].items():
        if leaked:
            held = next(_records(part) for part in data["eval"]["sets"] if part["name"] == name)
            yield (
                f"eval {name}: warning: {leaked:,} of {held:,} records are in the training data, too; its loss will "
                "look better than it is"
            )


def _records(entry: Mapping[str, Any]) -> int:
    """Of an entry of data.json; a pair is one."""
    return sum(entry["groups"].values())
