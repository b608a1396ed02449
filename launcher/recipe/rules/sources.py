"""Where model and data come from, and which parts of them the rest of the recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Problem
from launcher.recipe.paths import DATA_ENDINGS, looks_like_path, split_choice
from launcher.recipe.schema import Recipe

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
    """Only records of messages have tags, only hub datasets splits, subsets and folders."""
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for i, source in enumerate(sources):
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
