"""Where the files that come with the launcher lie: in a checkout beside the package, in a wheel inside it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of shipped `recipes`, `configs` or `slurm`.

    Raises:
        FileNotFoundError: this installation has no such folder.
    """
    package = Path(str(resources.files("launcher")))
    for place in (package / "shipped" / name, package.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"this installation of launcher has no '{name}' folder, neither in {package}/shipped nor beside {package}"
    )
