"""How a recipe is put together from its levels, and where each value came from; what values must satisfy is `check`'s.

Levels, each over the one before: schema default < extends < recipe < cluster preset of LAUNCHER_CLUSTER < key=value.
OmegaConf resolves `${...}`, and is imported only for a recipe that has one. Laying levels over one another and typing
are done here, because OmegaConf reports one mistake at a time, converts "5" to 5 silently, and knows no lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RecipeError
from launcher.recipe.presets import find, recipe_file, recipe_hint
from launcher.recipe.read import read_arguments, read_file, shown
from launcher.recipe.schema import Recipe, to_dict
from launcher.recipe.tree import BAD, DEFAULT, Node, Origin, children, merge, node_of
from launcher.recipe.typed import build

__all__ = ["DEFAULT", "Composed", "Draft", "Origin", "compose", "draft"]

SECTIONS = tuple(f.name for f in fields(Recipe))
SHELL_LINES = ("cluster", "setup")  # their ${...} belongs to the shell
_RESOLVER = re.compile(r"\$\{[^{}$]*:")

# of each group one key may be given; one given at a higher level takes away the others given below
EXCLUSIVE: tuple[dict[str, Any], ...] = (
    {"train.max_steps": None, "train.epochs": None},
    {"model.name": None, "model.config": None},
    {"optimizer.warmup_steps": None, "optimizer.warmup_ratio": None},
    {"data.eval": [], "data.eval_fraction": 0.0},
)


@dataclass(slots=True)
class Composed:
    """A typed recipe, the origin of every leaf (`data.train.0.path`), and the recipe's file."""

    recipe: Recipe
    origins: dict[str, Origin]
    path: Path

    def where(self, key: str) -> str:
        """The place a message points at for `key`: its own, one below it, or one above it; empty for a default."""
        while key:
            inside = [origin for name, origin in self.origins.items() if name == key or name.startswith(f"{key}.")]
            if inside:
                return next((str(origin) for origin in inside if origin is not DEFAULT), "")
            key = key.rpartition(".")[0]
        return ""


@dataclass(slots=True)
class Draft:
    """A composition with its complaints; `broken` and `lost` as in `Typed`."""

    composed: Composed
    problems: list[Problem]
    broken: set[str]
    lost: set[str]


def compose(path: Path | str, overrides: Sequence[str] = ()) -> Composed:
    """The typed recipe in a file, changed by `key=value` arguments.

    path: a YAML file, or the bare name of a shipped recipe.
    Raises:
        RecipeError: every unknown key, wrong type, missing value, preset that is not there, at once.
    """
    drafted = draft(path, overrides)
    if drafted.problems:
        raise RecipeError(drafted.problems, shown(drafted.composed.path))
    return drafted.composed


def draft(path: Path | str, overrides: Sequence[str] = (), *, resolved: bool = False) -> Draft:
    """`compose` that hands its complaints back, so that others can be added to them.

    resolved: the file is a run's own recipe, already composed: LAUNCHER_CLUSTER does not reach into it again.
    Raises:
        RecipeError: there is no such file, or no YAML in it; nothing else can be said then.
    """
    file = recipe_file(str(path))
    if file is None:
        expected = "a recipe file, or the name of a shipped recipe"
        raise RecipeError([Problem("recipe", str(path), expected, recipe_hint(str(path)))], str(path))
    problems: list[Problem] = []
    tree = node_of(to_dict(Recipe()), DEFAULT)
    cluster = "" if resolved else os.environ.get("LAUNCHER_CLUSTER", "")
    for level in _levels(file, cluster, overrides, problems):
        tree = _lay(tree, level, problems)
    if unreadable := [problem for problem in problems if problem.key == "recipe"]:
        raise RecipeError(unreadable, shown(file))  # all else would be said of keys that could not be read
    _interpolate(tree, problems, everywhere=not resolved)
    typed = build(tree, lost=SECTIONS if any(problem.key == "extends" for problem in problems) else ())
    broken = typed.broken | {problem.key.removesuffix(".preset") for problem in problems}
    problems = in_order([*problems, *typed.problems])
    return Draft(Composed(typed.recipe, typed.origins, file), problems, broken, typed.lost)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems in the order of the sections; what belongs to none comes first."""
    order = {section: i for i, section in enumerate(SECTIONS)}
    return sorted(problems, key=lambda problem: order.get(problem.key.partition(".")[0], -1))


def _levels(file: Path, cluster: str, overrides: Sequence[str], problems: list[Problem]) -> Iterator[Node]:
    """The levels above the defaults, lowest first, presets already in place."""
    for path, tree in _chain(file, problems):
        yield _with_presets(tree, path.parent, problems)
    if cluster:
        origin = Origin(f"LAUNCHER_CLUSTER={cluster}")
        yield _with_presets(Node({"cluster": Node(cluster, origin)}, origin), file.parent, problems)
    arguments = read_arguments(overrides, problems, sections=SECTIONS)
    if extends := arguments.value.pop("extends", None):
        fix = "Write extends: in the recipe's file."
        problems.append(Problem("extends", extends.plain(), "no argument", fix, str(extends.origin)))
    yield _with_presets(arguments, file.parent, problems)


def _chain(file: Path, problems: list[Problem]) -> list[tuple[Path, Node]]:
    """The recipe and what it extends, most basic first, without their `extends` keys."""
    chain: list[tuple[Path, Node]] = []
    seen = [file.resolve()]
    while True:
        tree = read_file(file, problems)
        extends = tree.value.pop("extends", None)
        chain.insert(0, (file, tree))
        if extends is None:
            return chain
        base = _base(file, extends, problems)
        if base is None:
            return chain
        if base.resolve() in seen:
            loop = " -> ".join(shown(path) for path, _ in reversed(chain))
            expected = f"no circle ({loop} -> {shown(base)})"
            problems.append(Problem("extends", extends.value, expected, "Remove one `extends`.", str(extends.origin)))
            return chain
        seen.append(base.resolve())
        file = base


def _base(file: Path, extends: Node, problems: list[Problem]) -> Path | None:
    if isinstance(extends.value, str):
        if found := recipe_file(extends.value, beside=file.parent):
            return Path(os.path.normpath(found))
        hint = recipe_hint(extends.value, beside=file.parent)
    elif extends.value is BAD:
        return None
    else:
        hint = "A recipe extends one other."
    expected = f"a recipe file, relative to {shown(file.parent) or '.'}"
    problems.append(Problem("extends", extends.plain(), expected, hint, str(extends.origin)))
    return None


def _with_presets(level: Node, beside: Path, problems: list[Problem]) -> Node:
    """The level with every chosen preset in place; such a section is marked `_Fresh`."""
    values = {name: _expand(name, node, beside, problems) for name, node in level.value.items()}
    return Node(values, level.origin)


def _expand(section: str, node: Node, beside: Path, problems: list[Problem]) -> Node:
    """Defaults < the preset that this section chooses < the changes beside it; the node itself if it chooses none."""
    inside = node.value if isinstance(node.value, dict) else {"preset": node} if isinstance(node.value, str) else {}
    chosen = inside.get("preset")
    if section not in SECTIONS or chosen is None or chosen.value is BAD:
        return node
    if not isinstance(chosen.value, str):
        problems.append(Problem(f"{section}.preset", chosen.plain(), "the name of a preset", where=str(chosen.origin)))
        return Node(BAD, node.origin)
    file = find(section, chosen.value, beside, problems, where=str(chosen.origin))
    if file is None:
        return Node(BAD, node.origin)
    preset = read_file(file, problems, key=section)
    changes = Node({key: value for key, value in inside.items() if key != "preset"}, node.origin)
    default = node_of(to_dict(Recipe())[section], DEFAULT)
    below = merge(_drop_rivals(section, default, preset.value), preset, problems, key=section)
    return _Fresh(merge(_drop_rivals(section, below, changes.value), changes, problems, key=section).value, node.origin)


class _Fresh(Node):
    """A section that a preset began: it replaces what lower levels said."""


def _lay(tree: Node, level: Node, problems: list[Problem]) -> Node:
    """A level over the tree below it."""
    values = dict(tree.value)
    for name, node in level.value.items():
        below = values.get(name)
        if below is None or isinstance(node, _Fresh) or not isinstance(node.value, dict):
            values[name] = node
        else:
            values[name] = merge(_drop_rivals(name, below, node.value), node, problems, key=name)
    return Node(values, tree.origin)


def _drop_rivals(section: str, below: Node, given: dict[str, Node]) -> Node:
    """What is below, without the keys that a key given above excludes."""
    if not isinstance(below.value, dict):
        return below
    values = dict(below.value)
    for group in EXCLUSIVE:
        names = {key.partition(".")[2]: empty for key, empty in group.items() if key.startswith(f"{section}.")}
        chosen = [name for name, empty in names.items() if name in given and given[name].value not in (None, empty)]
        given_below = [
            name for name, empty in names.items() if name in values and values[name].value not in (None, empty)
        ]
        if len(chosen) == 1:
            origin = given[chosen[0]].origin
            values.update({name: Node(names[name], origin) for name in given_below if name not in given})
    return Node(values, below.origin)


def _interpolate(tree: Node, problems: list[Problem], *, everywhere: bool) -> None:
    """Put the values of other keys in place of `${...}`, in place; unless `everywhere`, in arguments only."""
    texts = [(path, node) for path, node in _texts(tree, ()) if everywhere or node.origin.line is None]
    wanting = [(path, node) for path, node in texts if "${" in node.value and path[:2] != SHELL_LINES]
    if not wanting:
        return
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def refuse(path: tuple[str, ...], node: Node, expected: str, fix: str = "") -> None:
        problems.append(Problem(".".join(path), node.plain(), expected, fix, str(node.origin)))
        node.value = BAD

    for path, node in wanting:
        if _RESOLVER.search(node.value):
            fix = "Name a secret in cluster.env, give any other value as key=value."
            refuse(path, node, "no resolver: a recipe reads nothing from outside", fix)
            continue
        try:
            OmegaConf.create([node.value])
        except OmegaConfBaseException as error:
            refuse(path, node, f"the name of another key in ${{...}} ({str(error).splitlines()[0]})")
    plain = tree.plain()
    if isinstance(plain.get("cluster"), dict):
        plain["cluster"].pop("setup", None)
    values = OmegaConf.create(plain)
    for path, node in wanting:
        if node.value is BAD:
            continue
        try:
            value = _at(values, path)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            refuse(path, node, f"the name of another key in ${{...}} ({str(error).splitlines()[0]})")
            continue
        node.value = node_of(value, node.origin).value


def _at(config: Any, path: tuple[str, ...]) -> Any:
    """The resolved value at a path of keys and indices (not a dotted key: free keys may hold dots)."""
    for name in path:
        config = config[name] if hasattr(config, "keys") else config[int(name)]
    return config


def _texts(node: Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
    if isinstance(node.value, str):
        yield path, node
    for name, inner in children(node.value):
        yield from _texts(inner, (*path, name))
