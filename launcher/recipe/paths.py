"""Which words of a recipe are paths, what must lie there, and how they are made absolute; hub ids are left alone."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import Problem, nearest
from launcher.recipe.schema import Recipe, Source
from launcher.recipe.schema.checkpoint import STORES
from launcher.shipped import chat_templates

_KINDS = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".arrow")
DATA_ENDINGS = tuple(kind + packed for kind in _KINDS for packed in ("", ".gz", ".bz2", ".xz"))
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GLOB = re.compile(r"[*?\[]")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def looks_like_path(word: str) -> bool:
    """Whether a word names something on disk: begins like a path, ends like a data file, is a pattern, or exists."""
    word, _ = split_choice(word)
    if is_remote(word):
        return False
    if word.startswith(("/", "./", "../", "~/")) or word in (".", "..", "~"):
        return True
    return word.endswith(DATA_ENDINGS) or bool(_GLOB.search(word)) or os.path.exists(word)


def is_remote(word: str) -> bool:
    """Whether a word names a file of another store, as s3://bucket/file."""
    return "://" in word


def split_choice(word: str) -> tuple[str, str]:
    """A source's path, and what it says to take of it: `#500`, `#name`, or nothing."""
    path, mark, choice = word.partition("#")
    return (word, "") if os.path.exists(os.path.expanduser(word)) else (path, mark + choice)


def absolute(word: str) -> str:
    """A path from the current directory, without links followed; what stands behind `#` stays."""
    path, choice = split_choice(word)
    return os.path.abspath(os.path.expanduser(path)) + choice


def make_absolute(recipe: Recipe) -> None:
    """Every path of a recipe made absolute, in place, so that a run is the same from any directory."""
    model, data = recipe.model, recipe.data
    recipe.run.dir = absolute(recipe.run.dir)
    for owner, key in (
        (model, "name"),
        (model, "tokenizer"),
        *((source, "path") for source in [*data.train, *data.eval]),
    ):
        word = getattr(owner, key)
        if word is not None and looks_like_path(word):
            setattr(owner, key, absolute(word))
    for key in ("chat_template", "cache_dir"):
        if (word := getattr(data, key)) is not None and not (key == "chat_template" and word in chat_templates()):
            setattr(data, key, absolute(word))
    if (shipped := recipe.cluster.ray.working_dir) is not None:
        recipe.cluster.ray.working_dir = absolute(shipped)


def only_in_pods(recipe: Recipe) -> bool:
    """Whether the job's pods, and not this machine, have what its paths name; inside of the job all are looked for."""
    return recipe.cluster.target == "kubernetes" and "LAUNCHER_JOB_ID" not in os.environ


def check_pod_paths(recipe: Recipe) -> Iterator[Problem]:
    """Paths that pods would not see: of this machine's disk, since only cluster.kubernetes.mount is theirs."""
    if not only_in_pods(recipe):
        return
    mount, data = os.path.normpath(recipe.cluster.kubernetes.mount), recipe.data
    words = {
        **{f"model.{key}": getattr(recipe.model, key) for key in ("name", "tokenizer")},
        **{f"data.train.{i}.path": source.path for i, source in enumerate(data.train)},
        **{f"data.eval.{i}.path": source.path for i, source in enumerate(data.eval)},
        **{
            f"data.{key}": word and absolute(word)
            for key in ("chat_template", "cache_dir")
            if (word := getattr(data, key)) and word not in chat_templates()
        },
        "checkpoint.mirror": (recipe.checkpoint.mirror or "").removeprefix("file://") or None,
    }
    for key, word in words.items():
        if word is not None and looks_like_path(word) and not absolute(word).startswith(mount.rstrip("/") + "/"):
            expected = f"a path below cluster.kubernetes.mount = {mount}, which is all that pods see"
            fix = f"Copy it to the claim, and write {mount}/{os.path.basename(absolute(word))}."
            yield Problem(key, word, expected, fix, because=("cluster.kubernetes.mount",))


def check_model_paths(recipe: Recipe) -> Iterator[Problem]:
    """A model or tokenizer folder that is not there or not whole; a word that is neither a path nor a hub id."""
    for key, needed in (("name", ("config.json",)), ("tokenizer", _TOKENIZER_FILES)):
        word = getattr(recipe.model, key)
        if word is None:
            continue
        full = f"model.{key}"
        if not looks_like_path(word):
            yield from _hub_id(full, word)
        elif only_in_pods(recipe):
            continue  # `check_pod_paths` says what can be said from here
        elif key == "tokenizer" and word.endswith(".json") and os.path.isfile(absolute(word)):
            continue  # a tokenizer.json alone, as the tokenizers library writes it
        elif not os.path.isdir(path := absolute(word)):
            yield Problem(full, word, "a folder that exists, or a hub id as org/name", _beside(path))
        elif not any(os.path.isfile(os.path.join(path, file)) for file in needed):
            yield Problem(full, word, f"a folder with {' or '.join(needed)}", _first_inside(path))


def check_data_paths(recipe: Recipe) -> Iterator[Problem]:
    """Data files that are not there or of an unknown kind; a chat template that is not a file."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for i, source in enumerate(sources):
            if not (only_in_pods(recipe) and looks_like_path(source.path)):
                yield from _source(f"data.{key}.{i}.path", source)
    template = recipe.data.chat_template
    if template is None or template in chat_templates() or only_in_pods(recipe):
        return
    if not os.path.isfile(path := absolute(template)):
        expected = f"a file with a Jinja chat template, or one of {', '.join(chat_templates())}"
        yield Problem("data.chat_template", template, expected, nearest(template, chat_templates()) or _beside(path))
    else:
        yield from _no_template(template, path)


def _no_template(word: str, path: str) -> Iterator[Problem]:
    """A file that is no Jinja program; found before any record is read."""
    from launcher.jinja import syntax_error

    try:
        with open(path, encoding="utf-8") as file:
            wrong = syntax_error(file.read())
    except (OSError, UnicodeDecodeError) as error:
        yield Problem("data.chat_template", word, "a text file that can be read, in UTF-8", f"{error}.")
        return
    if wrong:
        yield Problem("data.chat_template", word, f"a Jinja template; line {wrong[0]}: {wrong[1]}", "Correct the line.")


def check_output_paths(recipe: Recipe) -> Iterator[Problem]:
    """Folders to be written that are files."""
    if only_in_pods(recipe):
        return
    for key, word in (("run.dir", recipe.run.dir), ("data.cache_dir", recipe.data.cache_dir)):
        if word is not None and os.path.isfile(absolute(word)):
            yield Problem(key, word, "a folder, this is a file")


def check_mirror(recipe: Recipe) -> Iterator[Problem]:
    """A mirror whose package is not installed, or that lies where the run lies."""
    key, mirror = "checkpoint.mirror", recipe.checkpoint.mirror
    if mirror is None:
        return
    scheme, mark, path = mirror.rpartition("://")
    package = STORES.get(scheme)
    if package is not None and not only_in_pods(recipe) and importlib.util.find_spec(package) is None:
        expected = f"a store whose package is installed: {scheme}:// needs {package}"
        yield Problem(key, mirror, expected, "Install the extra: pip install 'train-launcher[cloud]'.")
    elif not mark or scheme == "file":
        name, runs = recipe.run.name or "", absolute(recipe.run.dir)
        place = path.replace("{run}", name) if "{run}" in path else os.path.join(path, name)
        if os.path.commonpath([os.path.abspath(place), os.path.join(runs, name)]) == os.path.join(runs, name):
            yield Problem(key, mirror, f"another place than the run itself, {runs}/{name}", because=("run.dir",))


def folder_config(name: str | None) -> dict[str, Any] | None:
    """config.json of a model folder; None for a hub id, or a folder without a readable one."""
    if name is None or not looks_like_path(name):
        return None
    try:
        values = json.loads(Path(absolute(name), "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # `check_model_paths` says so for a missing one; an unreadable one is reported with the plan
    return values if isinstance(values, dict) else None


def _source(key: str, source: Source) -> Iterator[Problem]:
    if is_remote(source.path):
        return  # `prepare` asks the store
    word, choice = split_choice(source.path)
    if not looks_like_path(word):
        yield from _hub_id(key, word)
        return
    path = absolute(word)
    kinds = ", ".join(_KINDS)
    if os.path.isdir(path):
        if not any(name.endswith(DATA_ENDINGS) for _, _, names in os.walk(path) for name in names):
            yield Problem(key, word, f"a folder with data files ({kinds})")
        return
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True)) if _GLOB.search(word) else []
    if not files:
        yield Problem(
            key, word, "files that match" if _GLOB.search(word) else "a file or folder that exists", _beside(path)
        )
    elif strange := [file for file in files if not file.endswith(DATA_ENDINGS)]:
        name = "" if files == [path] else f" (not {os.path.basename(strange[0])})"
        yield Problem(key, word, f"files that end in {kinds}{name}", nearest(Path(strange[0]).suffix, _KINDS))
    elif choice and word.endswith(".json") and not choice[1:].isdigit():
        yield from _entry(key, source.path, path, choice[1:].partition("#")[0])


def _entry(key: str, word: str, registry: str, name: str) -> Iterator[Problem]:
    """A data set that the registry does not name."""
    try:
        names = list(json.loads(Path(registry).read_text(encoding="utf-8")).keys())
    except (OSError, ValueError):
        return  # `prepare` says what is wrong with the file
    except AttributeError:
        yield Problem(key, word, "a number of records behind the #, or a registry of data sets before it")
        return
    if name not in names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        yield Problem(key, word, f"the name of a data set behind the #, as {shown}", nearest(name, map(str, names)))


def _hub_id(key: str, word: str) -> Iterator[Problem]:
    if not _HUB_ID.fullmatch(word):
        path = absolute(word)
        yield Problem(key, word, "a path that exists, or a hub id as org/name", _beside(path))


def _beside(path: str) -> str:
    """The nearest name in the deepest folder of `path` that exists."""
    parent, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(parent):
        while not os.path.isdir(parent):
            parent, name = os.path.split(parent)
        return f"There is no {name} in {parent}."
    return nearest(name, os.listdir(parent))


def _first_inside(path: str) -> str:
    """A folder one below that may have been meant, as a run's `final` or a snapshot."""
    inside = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.is_dir() and os.path.isfile(os.path.join(entry.path, "config.json"))
    )
    return f"Did you mean {os.path.join(path, inside[0])}?" if inside else ""
