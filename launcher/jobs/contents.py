"""What the files beside a recipe held when its run began: the same names may stand for something else later.

Standard library only, and quick: small files by their hash, large ones by their size, beginning and end.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.jobs.changes import NOTHING, OTHER, Change, Kind
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory
from launcher.run.files import read_json, write_atomic

FILE = "contents.json"
_SMALL = 64 << 20  # bytes up to which a file is read whole; tokenizers are below it
_END = 1 << 16  # bytes at either end that stand for a large file
_MOST_FILES = 256  # of one source; the further ones are known by their sizes alone
_OF_TOKENIZER = (
    "*token*.json",
    "*token*.model",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
)
_OF_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def contents(recipe: Recipe) -> dict[str, str]:
    """What each file or source that a recipe names on this machine holds, by key and name; hubs and addresses are not
    among them."""
    found: dict[str, str] = {}
    for key, folder in (("model.name", recipe.model.name), ("model.tokenizer", recipe.model.tokenizer)):
        for file in _files_of_model(folder):
            found[f"{key}: {file.name}"] = _stamp(file)
    if (template := recipe.data.chat_template) is not None and os.path.isfile(template):
        found[f"data.chat_template: {Path(template).name}"] = _stamp(Path(template))
    for role in ("train", "eval"):
        for i, source in enumerate(getattr(recipe.data, role)):
            if files := _files_of_source(source.path):
                found[f"data.{role}.{i}: {source.path}"] = _stamp_of_all(files)
    return found


def remember(run: RunDirectory, recipe: Recipe) -> None:
    """Write down what they hold."""
    write_atomic(run.path / FILE, json.dumps({"version": 1, "contents": contents(recipe)}, indent=1) + "\n")


def changed_contents(run: RunDirectory, recipe: Recipe) -> list[Change]:
    """What holds something else than when the run began, under keys that did not change."""
    before: Mapping[str, str] = (read_json(run.path / FILE) or {}).get("contents", {})
    now = contents(recipe)
    pairs = ((key, before[key], now.get(key, "not there")) for key in before)
    return [Change(key, old, new, _rule(key, recipe, gone=key not in now)) for key, old, new in pairs if old != new]


def _rule(key: str, recipe: Recipe, *, gone: bool) -> tuple[Kind, str]:
    name = key.partition(": ")[2]
    if key.startswith("data.") and not key.startswith("data.chat_template"):
        if recipe.data.streaming and key.startswith("data.train"):
            return OTHER, "the stream would read other samples at the places that it has reached"
        return NOTHING, "nothing reads it again: rows stay as they were prepared; prepared anew they would be refused"
    if gone:
        return NOTHING, "nothing reads it again, or it is said when it is missed"
    if any(Path(name).match(pattern) for pattern in _OF_WEIGHTS):
        if recipe.adapter.kind == "full":
            return NOTHING, "only a run without a checkpoint reads it"
        return OTHER, "the adapter was trained beside other weights"
    if name == "config.json":
        return OTHER, "another architecture, or other settings of it, under the same name"
    return OTHER, "other tokens for the same text"


def _files_of_model(name: str | None) -> Iterator[Path]:
    """Of a folder of a model or tokenizer, or a tokenizer's one file, those that decide what is learnt."""
    if name is None or not os.path.exists(path := Path(name).expanduser()):
        return
    if path.is_file():
        yield path
        return
    patterns = ("config.json", *_OF_TOKENIZER, *_OF_WEIGHTS)
    yield from sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _files_of_source(path: str) -> list[Path]:
    plain = os.path.expanduser(path.partition("#")[0])
    if os.path.isfile(plain):
        return [Path(plain)]
    if os.path.isdir(plain):
        return sorted(file for file in Path(plain).rglob("*") if file.is_file())
    return sorted(Path(file) for file in glob.glob(plain, recursive=True)) if glob.has_magic(plain) else []


def _stamp_of_all(files: list[Path]) -> str:
    if len(files) == 1:
        return _stamp(files[0])
    whole = hashlib.sha256()
    for file in files[:_MOST_FILES]:
        whole.update(f"{file.name} {_stamp(file)}\n".encode())
    sizes = [file.stat().st_size for file in files]
    whole.update(str(sizes).encode())
    return f"{len(files)} files, {sum(sizes)} bytes, sha256 {whole.hexdigest()[:16]}"


def _stamp(file: Path) -> str:
    """Size and hash; of a large file that of its two ends, of safetensors that of the header and the end."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as handle:
        if size <= _SMALL and file.suffix != ".safetensors":
            digest.update(handle.read())
        else:
            digest.update(handle.read(_END))
            handle.seek(max(0, size - _END))
            digest.update(handle.read(_END))
    return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"
