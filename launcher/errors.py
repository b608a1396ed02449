"""What a user's mistake looks like: one problem, many problems at once, and the exit codes that scripts rely on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped with a durable checkpoint or before step 1, start me again


class UserError(Exception):
    """A mistake that the user can mend; the command line prints the text alone, no traceback, and exits with 2."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe.

    key: dotted key, as `train.global_batch_size`
    value: what the user gave
    expected: what is allowed there, without a full stop
    fix: what to write instead, a sentence
    where: `file.yaml:14`, or the argument; empty when the value is a default
    because: other keys whose values this rests on; where one of them is wrong itself, this says nothing new
    """

    key: str
    value: Any
    expected: str
    fix: str = ""
    where: str = ""
    because: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        fix = f" {self.fix}" if self.fix else ""
        return f"{place}{self.key} = {show_value(self.value)}: expected {self.expected}.{fix}"


class RecipeError(UserError, ValueError):
    """Everything that is wrong with a recipe, at once; `key` and `value` are those of the first problem."""

    def __init__(self, problems: Iterable[Problem], source: str = "recipe") -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        self.source = source
        self.key = self.problems[0].key
        self.value = self.problems[0].value
        count = len(self.problems)
        title = f"{source}: {count} problem{'s' if count != 1 else ''}"
        lines = (f"  {_within(source, problem)}" for problem in self.problems)
        super().__init__("\n".join([title, *lines]))


def _within(source: str, problem: Problem) -> Problem:
    """The problem as it reads below a title that names the file already: `line 14` for `file.yaml:14`."""
    if problem.where.startswith(f"{source}:"):
        return replace(problem, where="line " + problem.where.removeprefix(f"{source}:"))
    return problem


def show_value(value: Any) -> str:
    """A value as YAML would show it: null, true, bare words, [lists] and {mappings}."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(show_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show_value(item)}" for key, item in value.items()) + "}"
    return str(value)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `allowed`, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean '{match[0]}'?" if match else ""
