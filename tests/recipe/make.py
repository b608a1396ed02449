"""A small recipe on disk and ways to change it, for the tests of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.recipe.check import load
from launcher.recipe.compose import Composed

GOOD = """\
model: {name: org/model}
data:
  train: [{path: chat.jsonl}]
  seq_len: 128
train: {global_batch_size: 8, max_steps: 10}
"""


def write(folder: Path, text: str = GOOD, *, name: str = "recipe.yaml") -> Path:
    """The text as a file in a folder that also holds the data file which `GOOD` names."""
    data = folder / "chat.jsonl"
    if not data.exists():
        data.write_text('{"messages": []}\n')
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def loaded(folder: Path, *overrides: str, text: str = GOOD) -> Composed:
    """The recipe, checked; the current directory must be `folder`."""
    return load(write(folder, text).name, overrides)


def value(composed: Composed, key: str) -> Any:
    """What a dotted key holds."""
    found: Any = composed.recipe
    for name in key.split("."):
        found = (
            found[int(name)]
            if isinstance(found, list)
            else found[name]
            if isinstance(found, dict)
            else getattr(found, name)
        )
    return found
