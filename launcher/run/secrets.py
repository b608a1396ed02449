"""What is kept out of logs and outcomes: the values of the variables that `cluster.env` names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from launcher.errors import UserError
from launcher.run.directory import RunDirectory

MASK = "***"
LEAST = 6  # characters; a shorter value, as 1 or true, is no secret and would blot out ordinary text


def masked_by(names: Iterable[str]) -> Callable[[str], str]:
    """Replaces in a text the values that these variables have now by `***`; longer ones first, as one may hold another.

    A value of several lines is replaced line by line, since text arrives so.
    """
    lines = {line.strip() for name in names for line in os.environ.get(name, "").splitlines()}
    values = sorted((line for line in lines if len(line) >= LEAST), key=len, reverse=True)

    def mask(text: str) -> str:
        for value in values:
            if value in text:
                text = text.replace(value, MASK)
        return text

    return mask


def named_by(run: RunDirectory) -> list[str]:
    """The names in a run's `cluster.env`; none where its recipe cannot be read, which is said elsewhere."""
    try:
        return list(run.read_recipe().get("cluster", {}).get("env", []))
    except (OSError, UserError):
        return []
