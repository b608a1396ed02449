"""From a run to a folder that plain transformers or peft loads: no GPU, no process group, one parameter at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from launcher import __version__
from launcher.errors import UserError
from launcher.export.adapter import write_adapter
from launcher.export.consolidate import with_dtype, write_weights
from launcher.export.describe import build_skeleton, read_recipe, write_description
from launcher.export.source import open_checkpoint
from launcher.export.weights import merged, of_adapter, of_checkpoint
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory
from launcher.run.files import sync_folder, write_atomic
from launcher.trainer.checkpoint.reader import Reader

PROVENANCE = "launcher.json"


def export_run(
    run: RunDirectory,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    checkpoint: str | None = None,
    merge: bool = False,
) -> Path:
    """Write the Hugging Face folder of a run's newest good checkpoint; it appears whole or not at all.

    A run that trained an adapter gives a PEFT adapter folder, or with `merge` the folder of the whole model.

    Args:
        out: the folder; None: `final` in the run directory. An earlier export there is replaced.
        dtype: fp32, bf16 or fp16; None: as trained
        checkpoint: name of a checkpoint; None: the newest that proves to be whole
    Returns:
        The folder.
    Raises:
        UserError: no run, no such or no good checkpoint, nothing to merge or no base to load the adapter onto, or `out`
            holds something else.
    """
    if not run.exists():
        raise UserError(f"{run.path}: expected a run directory (with run.json). See `launcher runs`.")
    out = (run.final if out is None else out).absolute()
    _refuse_foreign(out)
    recipe = read_recipe(run)
    _refuse_form(run, recipe, merge=merge)
    reader = open_checkpoint(run, checkpoint)
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        stored = _write(recipe, reader, fresh, dtype=dtype, merge=merge)
        facts = {
            "launcher": __version__,
            "run_id": reader.manifest["run_id"],
            "checkpoint": reader.folder.name,
            "dtype": stored,
        }
        if recipe.adapter.kind != "full":
            facts |= {"merged": merge, "base": reader.manifest.get("base")}
        write_atomic(fresh / PROVENANCE, json.dumps(facts, indent=1) + "\n")
        _replace(out, fresh)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return out


def _write(recipe: Recipe, reader: Reader, folder: Path, *, dtype: str | None, merge: bool) -> str:
    """All but the provenance; torch's name of the type of most weights."""
    lm = build_skeleton(recipe, reader)
    if recipe.adapter.kind == "full":
        weights = of_checkpoint(reader)
    elif merge:
        weights = merged(recipe, reader, lm)
    else:
        revision = (reader.manifest.get("base") or {}).get("revision")
        return write_adapter(recipe, lm, with_dtype(of_adapter(reader), dtype), folder, revision=revision)
    stored = write_weights(with_dtype(weights, dtype), lm, folder)
    write_description(recipe, lm, folder, dtype=stored)
    return stored


def _refuse_form(run: RunDirectory, recipe: Recipe, *, merge: bool) -> None:
    if merge and recipe.adapter.kind == "full":
        raise UserError("--merge: expected a run with an adapter, this one trained every parameter. Leave it out.")
    if not merge and recipe.adapter.kind != "full" and recipe.model.name is None:
        raise UserError(
            "model.config: the base model's weights are random, made from train.seed and nowhere in a folder, so that "
            f"an adapter alone could not be loaded. Write the whole model: launcher export {run.path} --merge"
        )


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
