"""An architecture that can be built: sizes are counts, go by known names, divide one another and hold the adapter."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import Problem
from launcher.recipe.paths import folder_config
from launcher.recipe.schema import Recipe

Fault = tuple[str, Any, str, str]  # key of the config, its value, what is expected, the fix

_OF_EVERY_MODEL = ("hidden_size", "num_hidden_layers", "vocab_size")
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "n_inner")  # they follow from others then
_MAY_BE_ZERO = ("num_experts", "num_local_experts")


def buildable(recipe: Recipe) -> Iterator[Problem]:
    """What arithmetic can say of a config that is given or lies in the model's folder; the rest is said on the rank."""
    config = recipe.model.config or folder_config(recipe.model.name)
    if not config or "model_type" not in config:
        return
    from launcher.plan.parameters import size_keys

    if faults := list(_type(config)):
        yield from (_problem(recipe, fault) for fault in faults)
        return
    own = size_keys(config)
    faults = [*_misspelt(recipe.model.config or {}, own), *_counts(config, own)]
    yield from (_problem(recipe, fault) for fault in faults or _quotients({**own, **config}, known=bool(own)))
    if not faults and recipe.adapter.kind == "lora":
        yield from _rank(recipe, config)


def _problem(recipe: Recipe, fault: Fault) -> Problem:
    key, value, expected, fix = fault
    if recipe.model.config is not None:
        return Problem(f"model.config.{key}", value, expected, fix, because=("model.config",))
    return Problem("model.name", recipe.model.name, f"a config.json whose {key} is {expected}, it says {value}")


def _type(config: Mapping[str, Any]) -> Iterator[Fault]:
    if not isinstance(name := config["model_type"], str) or not name:
        yield "model_type", name, "the name of a causal language model, as in config.json", "Write e.g. llama."


def _misspelt(config: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Fault]:
    """Keys that all but spell a size, which would keep its default; moe_intermediate_size is no misspelling."""
    for key, value in config.items():
        near = [] if key in own else difflib.get_close_matches(str(key), own, n=1, cutoff=0.85)
        if near and not str(key).endswith(f"_{near[0]}"):
            yield key, value, f"a key that {config['model_type']} knows", f"Did you mean '{near[0]}'?"


def _counts(config: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Fault]:
    for key in own or _OF_EVERY_MODEL:
        value = config.get(key, 1)
        least = 0 if key in _MAY_BE_ZERO else 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (value is None and key in _MAY_BE_NULL):
            usual = f"Write e.g. {own[key]}." if own.get(key) else "Remove the key." if own else ""
            yield key, value, f"a whole number {'of 0 or more' if least == 0 else 'above 0'}", usual


def _quotients(config: Mapping[str, Any], *, known: bool) -> Iterator[Fault]:
    """Heads share the hidden size out, queries share keys, tokens choose among experts.

    config: with the family's own sizes where it gives none; known: a formula reads them
    """
    width, count = ("n_embd", "n_head") if "n_embd" in config else ("hidden_size", "num_attention_heads")
    heads, shared = config.get(count), config.get("num_key_value_heads")
    if known and config.get("head_dim") is None and (hidden := config[width]) % (heads := config[count]):
        near = max(1, round(hidden / heads)) * heads
        yield width, hidden, f"a multiple of {count} = {heads}", f"Nearest: {near}."
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        fits = max((n for n in range(1, min(shared, heads) + 1) if heads % n == 0), default=1)
        yield "num_key_value_heads", shared, f"a divisor of num_attention_heads = {heads}", f"Nearest: {fits}."
    experts, used = config.get("num_local_experts") or config.get("num_experts"), config.get("num_experts_per_tok")
    if known and experts and used and used > experts:
        yield "num_experts_per_tok", used, f"at most the {experts} experts of a block", f"Write {min(2, experts)}."


def _rank(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Problem]:
    """An adapter as wide as its layer could train that layer itself."""
    from launcher.plan.parameters import weights, widest_rank

    most = widest_rank(weights(config) or (), recipe.adapter.targets)
    if most is not None and recipe.adapter.rank > most:
        expected = f"at most {most}, the smaller dimension of the smallest layer it is put beside"
        because = ("adapter.targets", "model.name", "model.config")
        yield Problem(
            "adapter.rank", recipe.adapter.rank, expected, "16 is usual; or adapter.kind=full.", because=because
        )
