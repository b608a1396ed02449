"""What several verbs share: finding the run a person means, and plain columns of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import UserError, nearest
from launcher.run.directory import RunDirectory

RUNS_DIR = "runs"  # where runs lie unless run.dir says otherwise


def find_run(text: str) -> RunDirectory:
    """The run that a person names: a path, or a name below runs/.

    Raises:
        UserError: there is no such run; the nearest name is shown.
    """
    for path in (Path(text), Path(RUNS_DIR, text)):
        if (run := RunDirectory(path)).exists():
            return run
    if Path(text).is_dir():
        raise UserError(f"{text} is no run: it holds no run.json.")
    folder = Path(text).parent if "/" in text.rstrip("/") else Path(RUNS_DIR)
    names = [path.parent.name for path in folder.glob("*/run.json")]
    hint = nearest(Path(text).name, names) or f"Runs in {folder}/: {', '.join(sorted(names)[:10]) or 'none'}."
    raise UserError(f"no run '{text}': neither a path nor a name below {RUNS_DIR}/. {hint}")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def clock(seconds: float | None) -> str:
    """Unix seconds as local time; `-` if not known."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def progress(step: int | None, total_steps: int | None) -> str:
    """`120/400`, with `?` for what is not known yet."""
    return f"{'?' if step is None else step}/{'?' if total_steps is None else total_steps}"
