"""What each key means, read from the docstrings of the sections; run as a module it prints `docs/recipe.md`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any

from launcher.errors import show_value

_LINE = re.compile(r"^(\w+): (.+)$")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "any value"}


def field_docs(cls: type) -> dict[str, str]:
    """Key to meaning, from the `key: meaning` lines of a docstring (a line without a key continues the last one)."""
    names = {f.name for f in fields(cls)}
    docs: dict[str, str] = {}
    last = ""
    for line in (cls.__doc__ or "").splitlines():
        match = _LINE.match(line.strip())
        if match and match[1] in names:
            last = match[1]
            docs[last] = match[2]
        elif last and line.strip():
            docs[last] += " " + line.strip()
    return docs


def describe(hint: Any) -> str:
    """A type as a sentence needs it: `a whole number, or null`, `ddp or fsdp2`."""
    if is_dataclass(hint):
        return "keys " + ", ".join(f.name for f in fields(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        words = [describe(arg) for arg in arguments if arg is not type(None)]
        return " or ".join(words) + (", or null" if type(None) in arguments else "")
    if origin is typing.Literal:
        words = [show_value(value) for value in arguments]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is list:
        inner = arguments[0]
        return "a list of " + (
            "mappings with " + describe(inner) if is_dataclass(inner) else _PLURAL.get(inner) or describe(inner)
        )
    if origin is dict:
        return "a mapping" if arguments[1] is Any else "a mapping of words to words"
    return _WORDS[hint]


_PLURAL: dict[Any, str] = {str: "words", float: "numbers", int: "whole numbers"}

_HEAD = """\
# Recipe keys

Generated from the schema by `python -m launcher.recipe.schema._docs > docs/recipe.md`.

A recipe is YAML; each section is one table below. Only `train.global_batch_size`, `data.seq_len`, the sources in
`data.train`, a model and a length (`train.max_steps` or `train.epochs`) have to be given.

## How a recipe is put together

Levels, each over the one before: defaults of this page < `extends` < the recipe < the cluster preset named by the
environment variable `LAUNCHER_CLUSTER` < `key=value` arguments. Mappings join key by key; a list is replaced whole.

- **Preset.** A section given as a word (`strategy: fsdp2-offload`) is the file `strategy/fsdp2-offload.yaml`,
  looked for in `presets/strategy/` and `strategy/` beside the recipe, then in the folders of `LAUNCHER_PRESETS`
  (separated as in `PATH`), then among the shipped ones. It replaces what lower levels said of the section.
  `strategy: {preset: hsdp, shard: 4}` is a preset plus changes.
- **extends.** `extends: base.yaml` inherits a whole recipe; the path is relative to the file that says it. A name
  without a folder and an ending is a shipped recipe.
- **key=value.** Values are YAML: `optimizer.betas=[0.9,0.99]`, `train.max_grad_norm=null`.
  `data.train.0.path=x.jsonl` changes an item of a list (one past the end adds one). `key=null` takes a value away.
- **One of two.** Of `train.max_steps` and `train.epochs`, `model.name` and `model.config`, `optimizer.warmup_steps`
  and `optimizer.warmup_ratio`, `data.eval` and `data.eval_fraction` only one may be given. One given at a higher
  level takes away the other given below it.
- **Interpolation.** `${model.name}` is the value of another key. Environment variables cannot be read into a
  recipe; shell lines in `cluster.setup` are left as they are.
- **Values.** `true` and `false` are the only truth values (`yes`, `no`, `on`, `off` are errors), `1e-5` is a
  number, times are numbers of minutes.
- **Paths** are relative to the current directory. Something is a path when it begins with `/`, `./`, `../` or `~/`,
  when it exists, or when it has the ending of a data file; anything else is the id of a hub repository and is not
  looked up.

`launcher show RECIPE --origin` prints every value with the file and line, or the argument, that it came from.
`launcher check RECIPE...` prints every problem at once and exits with 2; `--json` prints a list with one object a
recipe:

```json
[{"recipe": "a.yaml", "ok": false, "problems": [
  {"key": "train.max_steps", "value": 0, "expected": "1 step or more", "fix": "", "where": "a.yaml:3"}]}]
```

`where` is `file:line`, `argument key=value`, or empty for a default; `value` is null, text, a number, a truth
value, a list or an object.
"""


def page() -> str:
    """The whole of docs/recipe.md."""
    from launcher.recipe.schema import Recipe

    hints = typing.get_type_hints(Recipe)
    meanings = field_docs(Recipe)
    parts = [_HEAD]
    for section in fields(Recipe):
        parts.append(
            f"## {section.name}\n\n{meanings[section.name].capitalize()}.\n\n"
            + _table(hints[section.name], section.name)
        )
    return "\n".join(parts)


def _table(cls: type, prefix: str) -> str:
    rows = "".join(
        f"| `{key}` | {kind} | {default} | {meaning} |\n" for key, kind, default, meaning in _rows(cls, prefix)
    )
    return f"| key | value | default | meaning |\n|---|---|---|---|\n{rows}"


def _rows(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints, meanings = typing.get_type_hints(cls), field_docs(cls)
    for f in fields(cls):
        hint, key = hints[f.name], f"{prefix}.{f.name}"
        if is_dataclass(hint):
            yield key, describe(hint), "", meanings[f.name]
            yield from _rows(typing.cast(type, hint), key)
        else:
            yield key, describe(hint), _default(f), meanings[f.name]
            items = typing.get_args(hint)
            if (
                typing.get_origin(hint) is list and is_dataclass(items[0]) and f.name != "eval"
            ):  # eval has the same keys as train
                yield from _rows(typing.cast(type, items[0]), f"{key}.N")


def _default(f: Field[Any]) -> str:
    value = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
    return "(must be given)" if value == "???" else f"`{show_value(value)}`"


if __name__ == "__main__":
    print(page(), end="")
