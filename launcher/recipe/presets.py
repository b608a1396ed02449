"""Where the file of a named preset or recipe lies: the user's own folders first, then the shipped ones."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import Problem, nearest
from launcher.shipped import folder

ENDINGS = (".yaml", ".yml")


def find(section: str, name: str, beside: Path, problems: list[Problem], *, where: str = "") -> Path | None:
    """The file of preset `name`; None after a complaint that lists what there is.

    beside: the folder of the recipe that names it.
    """
    if "/" not in name and os.sep not in name:
        for place in _folders(section, beside):
            if (found := place / f"{name}.yaml").is_file():
                return found
    there = names(section, beside)
    expected = f"a preset of {section} ({', '.join(there) or 'there is none'}) or a mapping of keys"
    fix = nearest(name, there)
    if section == "model":
        fix = fix or f"For a hub model or a folder write model: {{name: {name}}}."
    problems.append(Problem(section, name, expected, fix, where))
    return None


def names(section: str, beside: Path) -> list[str]:
    """Every preset of a section that can be named from a recipe in folder `beside`."""
    return sorted({file.stem for place in _folders(section, beside) if place.is_dir() for file in place.glob("*.yaml")})


def recipe_file(name: str, *, beside: Path | None = None) -> Path | None:
    """The file of a recipe: a path (relative to `beside` or the current directory), or a shipped one's bare name."""
    path = (beside / name) if beside else Path(name)
    if path.is_file():
        return path
    if "/" not in name and not name.endswith(ENDINGS) and (found := folder("recipes") / f"{name}.yaml").is_file():
        return found
    return None


def recipe_hint(name: str, *, beside: Path | None = None) -> str:
    """What may have been meant by a recipe that does not exist."""
    place = ((beside / name) if beside else Path(name)).parent
    there = [file.name for file in place.glob("*.yaml")] if place.is_dir() else []
    if hint := nearest(Path(name).name, there):
        return hint
    return nearest(Path(name).name.removesuffix(".yaml"), [file.stem for file in folder("recipes").glob("*.yaml")])


def _folders(section: str, beside: Path) -> list[Path]:
    extra = [Path(place) for place in os.environ.get("LAUNCHER_PRESETS", "").split(os.pathsep) if place]
    return [place / section for place in (beside / "presets", beside, *extra, folder("recipes"))]
