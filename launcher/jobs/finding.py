"""One thing that was looked at on a machine, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What `launcher doctor` and the preflight of a job tell.

    group: packages, devices, tools, operators, node or nodes
    state: ok; note, for what only some recipes need or what may go well; bad, for what keeps training from starting
    fix: what to do about a note or a bad one, a sentence; empty where nothing is to be done
    """

    group: str
    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.text}. {self.fix}" if self.fix else self.text
