"""What sources are called in figures and messages: the name in the recipe, else the last part of the path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from launcher.recipe.schema.data import Source

_ENDING = re.compile(r"(\.(json|jsonl|ndjson|parquet|csv|tsv|txt|arrow))?(\.(gz|bz2|xz|zst|zip))?$")


def source_names(sources: Sequence[Source]) -> list[str]:
    """A name for each source; those that follow from paths differ from all others, by -2, -3 ... where need be."""
    taken = {source.name for source in sources if source.name is not None}
    names = []
    for source in sources:
        name = source.name
        if name is None:
            name = _free(_stem(source.path), taken)
            taken.add(name)
        names.append(name)
    return names


def _free(name: str, taken: set[str]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _stem(path: str) -> str:
    """`data/chat.jsonl` -> chat, `data/*.jsonl` -> data, `dataset_info.json#identity` -> identity, `x#500` -> x."""
    where, _, choice = path.partition("#")
    if choice and not choice.isdigit():
        return choice
    parts = [part for part in PurePosixPath(where).parts if not re.search(r"[*?\[]", part) and part not in ("/", "..")]
    name = parts[-1] if parts else "data"
    return _ENDING.sub("", name) or name
