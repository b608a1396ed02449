"""Faults that begin inside the processes of a launcher's fork server: a rank that raises, a child that has just begun.

`Inside` puts a `sitecustomize` into the environment of a launcher. Only its fork server heeds it, and every process
that this one starts; what is to happen lies in a folder, so that it can be set while the launcher runs.
"""

from __future__ import annotations

import os
from pathlib import Path

_SITE = """
import os, sys
if "-c" in sys.orig_argv and "multiprocessing.forkserver" in sys.orig_argv[-1]:
    import tests.faults.inside as inside
    inside.heed()
"""
_FOLDER = "LAUNCHER_TEST_INSIDE"
ERRORS = {
    "python": "def oops(): raise ValueError('a bug of rank {rank}')\noops()",
    "memory": "import torch; torch.empty(1 << 55)",
}


class Inside:
    """A folder of faults, and the environment under which a launcher heeds them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "inside"
        self._folder.mkdir(parents=True)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        path = [str(site), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"PYTHONPATH": os.pathsep.join(path), _FOLDER: str(self._folder)}

    def raise_in(self, rank: int, *, after: int, error: str) -> None:
        """Once, when that rank of a later or the present attempt has made so many updates in its process."""
        (self._folder / f"raise-{rank}").write_text(f"{after} {error}")

    def hold_children(self) -> None:
        """Every process that the fork server starts waits before its first line of Python."""
        (self._folder / "hold").touch()

    def held(self) -> list[int]:
        """Process ids of those that wait."""
        return [int(file.name.partition("-")[2]) for file in self._folder.glob("held-*")]

    def let_go(self) -> None:
        """They go on."""
        (self._folder / "hold").unlink()


def heed() -> None:
    """Called in the fork server as Python starts, before anything of the launcher is imported."""
    folder = Path(os.environ[_FOLDER])
    os.register_at_fork(after_in_child=lambda: _begin(folder))


def _begin(folder: Path) -> None:
    import time

    if (folder / "hold").exists():
        (folder / f"held-{os.getpid()}").touch()
        while (folder / "hold").exists():
            time.sleep(0.01)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    count = 0

    def updated(*_: object) -> None:
        nonlocal count
        count += 1
        rank = os.environ["RANK"]
        order = folder / f"raise-{rank}"
        if order.exists() and count >= int(order.read_text().split()[0]):
            error = order.read_text().split()[1]
            order.unlink()
            exec(compile(ERRORS[error].format(rank=rank), "<fault>", "exec"), {})

    register_optimizer_step_post_hook(updated)
