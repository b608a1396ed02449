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


def chat_templates() -> list[str]:
    """Names of the shipped chat templates."""
    return sorted(path.stem for path in (folder("recipes") / "chat_templates").glob("*.jinja"))


def chat_template(word: str) -> Path:
    """The file that `data.chat_template` means: of the shipped one with this name, else the path itself."""
    if word in chat_templates():
        return folder("recipes") / "chat_templates" / f"{word}.jinja"
    return Path(word).expanduser()
