"""A launcher that stays warm: launches one run after another in one process, as it is told, and says which ranks live.

Started as `python -m tests.faults.lane` by `tests.faults.killing.Lane`, which may kill it at any moment.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_USER_ERROR, UserError
from launcher.jobs import warm
from launcher.jobs.agent import RankProcess
from launcher.jobs.console import Console
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.trainer import preload

RECORDER = "tests.faults.recorder"  # the fork server imports it, so every rank writes down the rows it takes


def main() -> None:
    """Answer each line of standard input, `{"recipe": ..., "changes": [...]}`, with how that launch ended."""
    words = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    preload.MODULES.append(RECORDER)
    warm.start("zero2", "cpu")  # one server for every strategy
    threading.Thread(target=tell_of_ranks, args=(words,), daemon=True).start()
    import torch.distributed.launcher.api  # noqa: F401

    say(words, ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        said = io.StringIO()
        try:
            recipe = load(Path(asked["recipe"]), asked["changes"]).recipe
            code = launch(recipe, force=False, console=Console(said))
        except UserError as error:
            code = EXIT_USER_ERROR
            said.write(str(error))
        say(words, code=code, said=said.getvalue())


def tell_of_ranks(words: Any) -> None:
    """Say the process id of each rank as it is started; a new attempt has new ones."""
    told = 0
    while True:
        started = RankProcess.started[told:]
        for process in started:
            if process.pid is None:
                break
            say(words, rank=process.pid)
            told += 1
        time.sleep(0.003)


def say(words: Any, **what: Any) -> None:
    words.write(json.dumps(what) + "\n")
    words.flush()


if __name__ == "__main__":
    main()
