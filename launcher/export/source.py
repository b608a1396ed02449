"""Which checkpoint is exported: the one asked for, or the newest whose every byte is proven."""

from __future__ import annotations

import logging

from launcher.errors import UserError
from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.checkpoint.retention import Hold
from launcher.trainer.checkpoint.verify import problems, read_manifest, why

log = logging.getLogger(__name__)


def open_checkpoint(run: RunDirectory, name: str | None) -> Reader:
    """A reader of a verified checkpoint, which a run that goes on training does not delete while this process lives.

    Raises:
        UserError: there is none, none of that name, or none that is whole; says what is wrong with each.
    """
    valid = {ref.path.name: ref.path for ref in ledger.valid_checkpoints(run)}
    if not valid:
        raise UserError(f"{run.path}: has no checkpoint yet, so there is nothing to export.")
    if name is not None and name not in valid:
        raise UserError(f"--checkpoint {name}: expected one of {', '.join(valid)}.")
    run_id = run.read_json(run.run_file.name)["run_id"]
    bad: list[str] = []
    for folder in [valid[name]] if name is not None else reversed(valid.values()):
        try:
            hold = Hold(folder)
        except OSError as error:  # deleted since it was listed
            found = [f"{folder.name}: {why(error)}"]
        else:
            if not (found := problems(folder, run_id=run_id)):
                reader = Reader(folder, read_manifest(folder, run_id=run_id), hold=hold)
                reader.open_all()  # for file systems whose locks do not reach the host that trains
                return reader
            hold.release()
        bad += found
        for problem in found:
            log.warning("bad checkpoint: %s", problem)
    raise UserError("\n".join([f"{run.path}: no checkpoint is whole:", *(f"  {problem}" for problem in bad)]))
