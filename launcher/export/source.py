"""Which checkpoint is exported: the one asked for, or the newest whose every byte is proven."""

from __future__ import annotations

import logging

from launcher.errors import UserError
from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint.format import CheckpointError
from launcher.trainer.checkpoint.reader import Reader, read_manifest, verify_files

log = logging.getLogger(__name__)


def open_checkpoint(run: RunDirectory, name: str | None) -> Reader:
    """A reader that holds all files open, so that a run that goes on training may delete them meanwhile.

    Raises:
        UserError: there is none, none of that name, or none that is whole; says what is wrong with each.
    """
    valid = {ref.path.name: ref.path for ref in ledger.valid_checkpoints(run)}
    if not valid:
        raise UserError(f"{run.path}: has no checkpoint yet, so there is nothing to export.")
    if name is not None and name not in valid:
        raise UserError(f"--checkpoint {name}: expected one of {', '.join(valid)}.")
    run_id = run.read_json(run.run_file.name)["run_id"]
    problems: list[str] = []
    for folder in [valid[name]] if name is not None else reversed(valid.values()):
        try:
            manifest = read_manifest(folder, run_id=run_id)
            found = verify_files(folder, manifest, range(len(manifest["files"])))
            if not found:
                reader = Reader(folder, manifest)
                reader.open_all()
                return reader
        except CheckpointError as error:
            found = [str(error)]
        except OSError as error:  # deleted since it was listed
            found = [f"{folder.name}: {error.strerror}"]
        problems += found
        for problem in found:
            log.warning("bad checkpoint: %s", problem)
    raise UserError("\n".join([f"{run.path}: no checkpoint is whole:", *(f"  {problem}" for problem in problems)]))
