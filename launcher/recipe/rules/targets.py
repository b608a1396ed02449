"""What the cluster section asks for that does not go with the place where it runs; what one target lacks, it says."""

from __future__ import annotations

import os
from collections.abc import Iterator

from launcher.errors import Problem
from launcher.recipe.schema import Recipe

_OF_ONE_MACHINE = ("/dev", "/proc", "/run", "/sys")  # by definition; of other folders the nodes themselves tell


def shared_folder(recipe: Recipe) -> Iterator[Problem]:
    """All nodes of a job share the run's directory."""
    nodes, folder = recipe.cluster.nodes, os.path.abspath(os.path.expanduser(recipe.run.dir))
    if nodes > 1 and folder.startswith(tuple(f"{place}/" for place in _OF_ONE_MACHINE)):
        place = "/" + folder.split("/")[1]
        expected = f"a folder that all {nodes} nodes share; {place} is each machine's own"
        yield Problem("run.dir", recipe.run.dir, expected, because=("cluster.nodes",))


def snapshot(recipe: Recipe) -> Iterator[Problem]:
    """Copied code is only where the run directory is, and only of use where no image brings its own."""
    cluster = recipe.cluster
    if not cluster.snapshot:
        return
    if cluster.target == "slurm" and (runtime := cluster.slurm.container.runtime) != "none":
        expected = f"false with cluster.slurm.container.runtime = {runtime}, whose image holds the code"
        because = ("cluster.target", "cluster.slurm.container.runtime")
        yield Problem("cluster.snapshot", True, expected, "Remove the key.", because=because)
    if cluster.target == "ray" and cluster.ray.address != "local":
        expected = "false unless cluster.ray.address is local: a cluster gets the code that is shipped to it"
        because = ("cluster.target", "cluster.ray.address")
        fix = "Remove the key; cluster.ray.working_dir ships a folder."
        yield Problem("cluster.snapshot", True, expected, fix, because=because)
