"""Section `objective`: what is minimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class Objective:
    """What is minimised.

    kind: sft learns the tokens that `data.train_on` names; pretrain learns every token
    """

    kind: Literal["sft", "pretrain"] = "sft"
