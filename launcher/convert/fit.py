"""Which tensor of another tool's checkpoint is which parameter of the recipe's model, and what has no partner."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.convert.source import Source
from launcher.errors import UserError

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Fit:
    """What a checkpoint gives to a model.

    names: parameter or buffer -> its name in the source
    without_moments: trained parameters whose moments it does not give
    """

    names: dict[str, str]
    without_moments: list[str]


def fit(source: Source, wanted: Mapping[str, Mapping[str, Any]], known: Collection[str]) -> Fit:
    """Find every wanted tensor in the source, whatever wrappers put before its name there.

    Args:
        wanted: name -> {shape, dtype, trainable}, all that a checkpoint of the run holds
        known: all names of the model, those of frozen parameters and of tied ones too
    Raises:
        UserError: a tensor is missing, of another shape, or one that the model has not; the first of each are named.
    """
    from launcher.trainer.model import hugging_face_name

    clean = {hugging_face_name(name): name for name in (*source.aliases, *source.shapes)}
    prefix = _prefix(clean, wanted)
    found = {name.removeprefix(prefix): theirs for name, theirs in clean.items() if name.startswith(prefix)}
    names = {own: _real(source, found[own]) for own in wanted if own in found}
    problems = [f"it has no {name}" for name in wanted if name not in names]
    problems += [
        f"{own} is {list(source.shapes[theirs])} there, the model's is {list(wanted[own]['shape'])}"
        for own, theirs in names.items()
        if list(source.shapes[theirs]) != list(wanted[own]["shape"])
    ]
    surplus = [clean[name] for name in clean if name.removeprefix(prefix) not in known or not name.startswith(prefix)]
    problems += [f"it holds {name}, which the model has not" for name in surplus if not _is_table(name)]
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n".join(f"  {problem}" for problem in [*problems[:SHOWN], *more])
        raise UserError(f"{source.title} does not fit the recipe's model (model.*, adapter.*):\n{listed}")
    trained = [name for name, entry in wanted.items() if entry["trainable"]]
    return Fit(names, [name for name in trained if names[name] not in source.moments])


def _prefix(clean: Collection[str], wanted: Collection[str]) -> str:
    """What stands before the names there, the choice that lets most of them fit."""
    first = next(iter(wanted), "")
    candidates = {"", *(name[: -len(first)] for name in clean if name.endswith(f".{first}"))}
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in clean for name in wanted))


def _real(source: Source, name: str) -> str:
    """Under which name a tied parameter lies."""
    return name if name in source.shapes else source.aliases[name]


def _is_table(name: str) -> bool:
    """Rotary frequencies, which older versions stored and which every model computes itself."""
    return name.endswith("rotary_emb.inv_freq")
