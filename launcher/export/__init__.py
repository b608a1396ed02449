"""From a run to a folder that plain transformers loads: no GPU, no process group, one parameter in memory at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from launcher import __version__
from launcher.errors import UserError
from launcher.export.consolidate import write_weights
from launcher.export.describe import build_skeleton, read_recipe, write_description
from launcher.export.source import open_checkpoint
from launcher.run.directory import RunDirectory
from launcher.run.files import sync_folder, write_atomic

PROVENANCE = "launcher.json"


def export_run(
    run: RunDirectory, out: Path | None = None, *, dtype: str | None = None, checkpoint: str | None = None
) -> Path:
    """Write the Hugging Face folder of a run's newest good checkpoint; it appears whole or not at all.

    Args:
        out: the folder; None: `final` in the run directory. An earlier export there is replaced.
        dtype: fp32, bf16 or fp16; None: as trained
        checkpoint: name of a checkpoint; None: the newest that proves to be whole
    Returns:
        The folder.
    Raises:
        UserError: no run, no such or no good checkpoint, or `out` holds something else.
    """
    if not run.exists():
        raise UserError(f"{run.path}: expected a run directory (with run.json). See `launcher runs`.")
    out = (run.final if out is None else out).absolute()
    _refuse_foreign(out)
    recipe = read_recipe(run)
    reader = open_checkpoint(run, checkpoint)
    lm = build_skeleton(recipe, reader)
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        stored = write_weights(reader, lm, fresh, dtype=dtype)
        write_description(recipe, lm, fresh, dtype=stored)
        facts = {
            "launcher": __version__,
            "run_id": reader.manifest["run_id"],
            "checkpoint": reader.folder.name,
            "dtype": stored,
        }
        write_atomic(fresh / PROVENANCE, json.dumps(facts, indent=1) + "\n")
        _replace(out, fresh)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out.is_dir() and ((out / PROVENANCE).exists() or not any(out.iterdir()))):
        raise UserError(f"--out {out}: expected a new or empty folder, or an earlier export. Nothing was written.")


def _replace(out: Path, fresh: Path) -> None:
    sync_folder(fresh)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
