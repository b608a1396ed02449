"""Where model and data come from, and which parts of them the rest of the recipe asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator

from launcher.errors import Problem, nearest
from launcher.recipe.paths import DATA_ENDINGS, looks_like_path, split_choice
from launcher.recipe.schema import Recipe, Source
from launcher.recipe.schema.columns import OTHER_NAME, TAGS, columns_of

_REGISTRY = "dataset_info.json"
_TAGGED = ("auto", "sharegpt", "messages", "preference", "unpaired")  # formats whose records may hold messages


def model_source(recipe: Recipe) -> Iterator[Problem]:
    """Only a hub model has revisions."""
    model = recipe.model
    if model.revision is None or (model.name is None and model.config is None):
        return
    if model.name is None or looks_like_path(model.name):
        what = "a folder" if model.name else "model.config"
        yield Problem(
            "model.revision",
            model.revision,
            f"null with {what}: only a hub model has revisions",
            "Remove the key.",
            because=("model.name", "model.config"),
        )


def data_sources(recipe: Recipe) -> Iterator[Problem]:
    """Only records of messages have tags, only hub datasets splits and folders; what names and `#` may be."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for i, source in enumerate(sources):
            yield from _choice(f"data.{key}.{i}", source)
            yield from _names(f"data.{key}.{i}", source)
            if source.tags and source.format not in _TAGGED:
                yield Problem(
                    f"data.{key}.{i}.tags",
                    source.tags,
                    f"null with format {source.format}, which has no tags",
                    "Remove the key.",
                )
            for name in ("split", "subset", "folder"):
                if getattr(source, name) is not None and split_choice(source.path)[0].endswith(DATA_ENDINGS):
                    value = getattr(source, name)
                    yield Problem(
                        f"data.{key}.{i}.{name}",
                        value,
                        f"null: only a hub dataset has a {name}, this is a file",
                        "Remove the key.",
                    )


def _choice(key: str, source: Source) -> Iterator[Problem]:
    """What stands behind `#`: a number of records, the name of a registry's entry, or one after the other."""
    word, choice = split_choice(source.path)
    first, *more = choice[1:].split("#")
    registry = os.path.basename(word) == _REGISTRY or (word.endswith(".json") and choice and not first.isdecimal())
    if registry and (not first or first.isdecimal()):
        expected = f"the name of an entry behind it, as {word}#identity"
        yield Problem(f"{key}.path", source.path, expected, f"{_REGISTRY} is a registry of data sets.")
        return
    if registry:
        for name in ("columns", "tags", "folder", "subset", "split"):
            if getattr(source, name) is not None:
                expected = "null: the registry's entry says it"
                yield Problem(f"{key}.{name}", getattr(source, name), expected, "Remove the key.")
        if source.format != "auto":
            yield Problem(f"{key}.format", source.format, "auto: the registry's entry says it", "Remove the key.")
    numbers = more if registry else [first, *more] if choice else []
    if any(not number.isdecimal() or int(number) < 1 for number in numbers) or len(numbers) > 1:
        behind = f"{word}#{first}" if registry else word
        yield Problem(f"{key}.path", source.path, f"a number of records behind the #, 1 or more, as {behind}#500")
    elif numbers and source.max_samples is not None:
        expected = f"null, because the path says #{numbers[0]}"
        yield Problem(f"{key}.max_samples", source.max_samples, expected, "Keep one of the two.")


def _names(key: str, source: Source) -> Iterator[Problem]:
    """Columns that the format has, or any format for auto; tags that there are."""
    allowed = columns_of(source.format)
    for name, theirs in (source.columns or {}).items():
        if OTHER_NAME.get(name, name) not in allowed:
            of = "any format has" if source.format == "auto" else f"format {source.format} has"
            expected = f"a name that {of}: {', '.join(allowed)}"
            yield Problem(f"{key}.columns.{name}", theirs, expected, nearest(name, allowed))
    for name, theirs in (source.tags or {}).items():
        if name not in TAGS:
            yield Problem(f"{key}.tags.{name}", theirs, f"one of {', '.join(TAGS)} as key", nearest(name, TAGS))


def objective(recipe: Recipe) -> Iterator[Problem]:
    """What is learnt of a conversation is for objectives that tell its tokens apart."""
    data = recipe.data
    if recipe.objective.kind == "pretrain" and data.train_on == "last_assistant":
        fix = "Write all, or remove the key."
        yield Problem("data.train_on", data.train_on, "all, because pretrain learns every token", fix)


def documents(recipe: Recipe) -> Iterator[Problem]:
    """Only where every token is learnt may a document follow another one unseen."""
    if not recipe.data.isolate and recipe.objective.kind != "pretrain":
        expected = f"true with objective.kind = {recipe.objective.kind}, whose conversations do not belong together"
        yield Problem("data.isolate", False, expected, "Remove the key.", because=("objective.kind", "data.packing"))


def stream(recipe: Recipe) -> Iterator[Problem]:
    """A stream has no end of its own."""
    if recipe.data.streaming and recipe.train.max_steps is None:
        fix = "Write e.g. train.max_steps=1000 in place of epochs."
        expected = "a number of steps with data.streaming, whose rows nobody has counted"
        yield Problem("train.max_steps", None, expected, fix, because=("data.streaming",))


def evaluation(recipe: Recipe) -> Iterator[Problem]:
    """Evaluation needs data."""
    data, every = recipe.data, recipe.train.eval_every_steps
    if every is not None and not data.eval and not data.eval_fraction:
        yield Problem(
            "train.eval_every_steps",
            every,
            "null, because there are no evaluation data",
            "Give data.eval or data.eval_fraction.",
            because=("data.eval", "data.eval_fraction"),
        )
