"""How recipe text becomes values that know their line: YAML without the surprises of version 1.1, and KEY=VALUE."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import Problem
from launcher.recipe.tree import BAD, Node, Origin, merge

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_YAML_1_1_BOOL = {"yes", "no", "on", "off"}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?")
# an emoji as JSON escapes it: two halves that YAML does not know; not after a backslash that is itself escaped
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w/-]([\w/ -]*[\w/-])?)*")


def shown(path: Path) -> str:
    """A path as messages show it: relative when it lies below the current directory."""
    absolute, here = os.path.abspath(path), os.getcwd() + os.sep
    return absolute.removeprefix(here)


def read_file(path: Path, problems: list[Problem], *, key: str = "") -> Node:
    """The mapping in a YAML file, `key` being where it will stand; an empty mapping after a complaint."""
    name = shown(path)
    empty = Node({}, Origin(name, 1))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        problems.append(Problem(key or "recipe", name, f"a readable YAML file ({reason})"))
        return empty
    node = _read(_SURROGATES.sub(_join_surrogates, text), name, None, problems, key)
    if node.value is None:
        return empty
    if not isinstance(node.value, dict):
        if node.value is not BAD:
            problems.append(
                Problem(
                    key or "recipe",
                    node.plain(),
                    "keys and values, as `train: {max_steps: 100}`",
                    where=str(node.origin),
                )
            )
        return empty
    return node


def read_arguments(arguments: Sequence[str], problems: list[Problem], *, sections: Collection[str]) -> Node:
    """A mapping of all `key.sub=value` arguments; `a.0.b=x` makes {a: {"0": {b: x}}}; of equal keys the last wins.

    A section given as a word becomes {preset: word}: `strategy=ddp` and `strategy.shard=1` may come in any order.
    """
    tree = Node({}, Origin("arguments"))
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not _KEY.fullmatch(key):
            problems.append(_not_key_value(argument, key, bool(equals)))
            continue
        origin = Origin(f"argument {_shown_argument(key, text)}")
        if not text.strip():
            problems.append(
                Problem(
                    key,
                    "",
                    "a value after =",
                    f"Write {key}=null for none, or {key}='\"\"' for empty text.",
                    str(origin),
                )
            )
            continue
        # an argument holds no anchors, tags or directives: what would begin one is a glob or a word
        node = Node(text, origin) if text[0] in "*&!%@`" else _read(text, "", origin, problems, key)
        if key in sections and isinstance(node.value, str):
            node = Node({"preset": node}, origin)
        for name in reversed(key.split(".")):
            node = Node({name: node}, origin)
        tree = merge(tree, node, problems)
    return tree


def dump(values: Any) -> str:
    """YAML that `read_file` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def dump_leaf(value: Any) -> str:
    """One value as it would stand in a list on one line."""
    return str(yaml.dump([value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1e9)).strip()[1:-1]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (plain scalars are read by `_scalar`)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_FLOAT, _LEADING_ZERO, _HEX):  # so that text which looks like our numbers is quoted
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _whole, list("-+.0123456789"))


def _read(text: str, file: str, argument: Origin | None, problems: list[Problem], key: str) -> Node:
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        origin = argument or Origin(file, mark.line + 1 if mark else None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
        shown_text = text if argument else "(text)"
        fix = "Quote the value." if argument else "Look at this line and the one above it."
        problems.append(Problem(key or "recipe", shown_text, f"valid YAML ({what})", fix, str(origin)))
        return Node(BAD, origin)
    if root is None:
        return Node(None, argument or Origin(file, 1))
    return _Converter(file, argument, problems).convert(root, key)


class _Converter:
    """YAML nodes to ours; complaints carry the dotted key and the line."""

    def __init__(self, file: str, argument: Origin | None, problems: list[Problem]) -> None:
        self.file, self.argument, self.problems = file, argument, problems
        self.open: set[int] = set()  # ids of the containers we are inside: an alias to one of them would never end

    def origin(self, node: Any) -> Origin:
        return self.argument or Origin(self.file, node.start_mark.line + 1)

    def complain(self, node: Any, key: str, value: Any, expected: str, fix: str = "") -> Any:
        self.problems.append(Problem(key or "recipe", value, expected, fix, str(self.origin(node))))
        return BAD

    def convert(self, node: Any, key: str) -> Node:
        origin = self.origin(node)
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            return Node(self.complain(node, key, node.tag, "a value without a YAML tag", "Remove the tag."), origin)
        if isinstance(node, yaml.ScalarNode):
            return Node(self.scalar(node, key), origin)
        if id(node) in self.open:
            return Node(self.complain(node, key, "(alias)", "an alias that does not hold itself"), origin)
        self.open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self.convert(item, f"{key}.{i}") for i, item in enumerate(node.value)]
        else:
            value = self.mapping(node, key)
        self.open.discard(id(node))
        return Node(value, origin)

    def mapping(self, node: Any, key: str) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(key_node, key, "(a list or mapping as key)", "a word as key")
                continue
            name = str(key_node.value)
            full = f"{key}.{name}" if key else name
            if name == "<<":
                self.complain(key_node, full, "(merge)", "no merge keys", "Use `extends:` or a preset.")
            elif name in values:
                fix = f"It is already given in {values[name].origin}; keep one of the two."
                self.complain(key_node, full, self.convert(value_node, full).plain(), "each key once", fix)
            else:
                values[name] = self.convert(value_node, full)
                values[name].origin = self.origin(key_node)
        return values

    def scalar(self, node: Any, key: str) -> Any:
        text: str = node.value
        if node.style:  # quoted (a plain scalar has None, or '' from libyaml) or block text stays text
            return text
        if text.lower() in _YAML_1_1_BOOL:
            fix = f'Write true or false (for the word itself write it in quotes: "{text}").'
            return self.complain(node, key, text, "a value that is none of yes, no, on, off", fix)
        if _SEXAGESIMAL.fullmatch(text):
            fix = f'Write minutes as a whole number, as 720 for 12 hours (for text write it in quotes: "{text}").'
            return self.complain(node, key, text, "a plain number, because YAML reads this as base 60", fix)
        if _LEADING_ZERO.fullmatch(text):
            fix = f'Write {int(text.replace("_", ""))}, or "{text}" in quotes for text.'
            return self.complain(node, key, text, "a number without leading zeros", fix)
        return _plain_scalar(text)


def _join_surrogates(match: re.Match[str]) -> str:
    return match[1] + bytes.fromhex(match[2] + match[3]).decode("utf-16-be")


def _plain_scalar(text: str) -> Any:
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _not_key_value(argument: str, key: str, has_value: bool) -> Problem:
    expected = "KEY=VALUE with a dotted key, as train.max_steps=5"
    bare = key.lstrip("~+-")
    if key.startswith("~"):
        fix = f"Nothing is deleted from a recipe: write {bare}=null for none, or {bare}=VALUE."
    elif key.startswith(("+", "-")) and _KEY.fullmatch(bare):
        fix = f"Write {bare}={argument.partition('=')[2] or 'VALUE'}, without a sign in front."
    elif not has_value and argument.endswith((".yaml", ".yml")):
        fix = "A recipe can inherit one other recipe by `extends:`; here only KEY=VALUE follows."
    else:
        fix = "No spaces around =, and a value after it." if not has_value else "Join section and key by a dot."
    return Problem(argument if not has_value else key, "(argument)", expected, fix)


def _shown_argument(key: str, text: str) -> str:
    secret = key.startswith("cluster.env") or key == "cluster"  # somebody may have given a value instead of a name
    return f"{key}=..." if secret or len(text) > 60 else f"{key}={text}"
