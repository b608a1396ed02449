"""The environment of a job on this node: set-up lines run once by bash, named variables, the installed extra."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence

from launcher.errors import UserError

NEEDED = ("torch", "transformers", "datasets", "safetensors", "numpy", "numba", "xxhash")


def require_train_extra() -> None:
    """Raises UserError with the command that installs what training needs, if any of it is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise UserError(f'training needs {names}, which this Python lacks: pip install "train-launcher[train]"')


def require_variables(names: Sequence[str], *, after_setup: bool = False) -> None:
    """Raises UserError naming each variable of cluster.env that is not set; values are never read.

    after_setup: set-up lines, which may export a name, have run; the text says so
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        where = "not set, and cluster.setup has run without exporting" if after_setup else "not set in the environment."
        fix = "it. Export it there or before" if after_setup else "Export it"
        raise UserError(f"cluster.env: {', '.join(missing)} {where} {fix}, or remove the name.")


def evaluate_setup(lines: Sequence[str]) -> None:
    """Run shell lines once and take over the environment they leave, for every process started from here on.

    Raises:
        UserError: a line failed; the text holds what bash said.
    """
    if not lines:
        return
    read, write = os.pipe()
    script = "\n".join(["set -e", *lines, f"env -0 >&{write}"])
    with os.fdopen(read, "rb") as pipe, tempfile.TemporaryFile() as errors:
        bash = subprocess.Popen(["bash", "-c", script], pass_fds=[write], stdin=subprocess.DEVNULL, stderr=errors)
        os.close(write)
        left = pipe.read().decode(errors="surrogateescape")
        code = bash.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if code != 0:
        raise UserError(f"cluster.setup failed with {code}: {said or '(bash said nothing)'}")
    environment = dict(item.split("=", 1) for item in left.split("\0") if "=" in item)
    for name in _BASH_OWN:
        environment.pop(name, None)
    for name in set(os.environ) - set(environment) - _BASH_OWN:
        del os.environ[name]
    os.environ.update(environment)


_BASH_OWN = {"_", "SHLVL", "PWD", "OLDPWD"}
