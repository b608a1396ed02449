"""What a process of the fork server does: tie itself to the server, take its environment, then train or prepare."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from launcher.jobs.tether import die_with_parent


def train(run: str, attempt: int, server: int, environment: Mapping[str, str]) -> None:
    """One rank of an attempt; torch's agent has set RANK and its like.

    server: process id of the fork server
    environment: what the launcher decided for this attempt; the fork server may be older than the attempt
    """
    die_with_parent(server)
    _look_for_garbage()
    os.environ.update(environment)
    from launcher.trainer.main import run_rank

    run_rank(run, attempt)


def prepare(run: str, server: int, pipe: Connection) -> None:
    """Node 0's first act: build or find the data store and write data.json. Sends ("progress", ...), then one
    ("done",) or ("user", text) or ("failed", traceback)."""
    die_with_parent(server)
    _look_for_garbage()
    from launcher.run.directory import RunDirectory
    from launcher.run.secrets import masked_by, named_by

    try:
        from launcher.jobs.preparation import prepare_run

        prepare_run(run, lambda *what: pipe.send(("progress", *what)))
        pipe.send(("done",))
    except Exception as error:
        kind, text = _failure(error)
        pipe.send((kind, masked_by(named_by(RunDirectory(Path(run))))(text)))
    finally:
        pipe.close()


def _look_for_garbage() -> None:
    """From here on, but not among the modules that the fork server imported: they stay, and their pages shared."""
    gc.freeze()
    gc.enable()


def _failure(error: Exception) -> tuple[str, str]:
    from launcher.errors import UserError

    return ("user", str(error)) if isinstance(error, UserError) else ("failed", traceback.format_exc())
