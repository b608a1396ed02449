"""`python -m launcher.jobs.ray_shards RECIPE N`: prepare on a Ray cluster, a task for each share and then one merge.

Each task runs `launcher prepare` in a process of its own. A task whose node is lost is started again on another by Ray;
what it had finished is kept in the cache folder, which all nodes share.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_USER_ERROR, UserError
from launcher.jobs.ray_driver import cluster_of, say

_RETRIES = 3  # of a task whose node is lost


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything is prepared, else the code of a share that failed, with its last lines."""
    parser = argparse.ArgumentParser(prog="python -m launcher.jobs.ray_shards", description=__doc__)
    parser.add_argument("recipe", help="the resolved recipe, where the driver starts")
    parser.add_argument("shares", type=int, help="number of tasks")
    parser.add_argument("--folder", help="where the tasks run, from the directory of Ray's own processes")
    given = parser.parse_args(arguments)
    cluster, text = cluster_of(given.recipe), Path(given.recipe).read_text(encoding="utf-8")
    try:
        import ray
    except ImportError:
        raise UserError('Ray is not installed in this Python: pip install "train-launcher[ray]"') from None
    ray.init(address="auto", log_to_driver=False, logging_level="error", configure_logging=True)
    try:
        cpus = cluster.ray.cpus_per_node or 1
        task = ray.remote(prepare).options(num_cpus=cpus, resources=cluster.ray.resources, max_retries=_RETRIES)
        workers = [f"data.num_workers={cpus}"]
        left = {
            task.remote(text, [*workers, "--shards", f"{i}/{given.shares}"], given.folder): i
            for i in range(given.shares)
        }
        done = 0
        while left:
            (ready,), _ = ray.wait(list(left), num_returns=1)
            number = left.pop(ready)
            if (code := _ended(ray, ready, f"share {number} of {given.shares}")) != EXIT_FINISHED:
                for other in left:
                    ray.cancel(other, force=True)
                return code
            done += 1
            say(f"tokenised: {done} of {given.shares} shares")
        return _ended(ray, task.remote(text, workers, given.folder), "merge", show=True)
    finally:
        ray.shutdown()


def prepare(recipe: str, options: list[str], folder: str | None) -> tuple[int, str]:
    """Exit code and output of `launcher prepare` with the text of a recipe; runs on a node."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="launcher-ray-") as scratch:
        file = Path(scratch, "recipe.yaml")
        file.write_text(recipe)
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "prepare", str(file), *options], cwd=folder, env=dict(os.environ),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    return done.returncode, done.stdout


def _ended(ray: Any, answer: Any, what: str, *, show: bool = False) -> int:
    """The exit code of a task; its output where it failed, or is to be shown."""
    try:
        code, output = ray.get(answer)
    except ray.exceptions.RayError as error:
        say(f"{what} is lost with its node, {_RETRIES + 1} times: {str(error).splitlines()[0]}")
        return EXIT_FAILED
    if show or code != EXIT_FINISHED:
        say(output.rstrip())
    if code != EXIT_FINISHED:
        say(f"{what} ended with {code}")
    return int(code)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
