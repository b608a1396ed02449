"""Section `adapter`: which parameters learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class Adapter:
    """Which parameters learn.

    kind: full trains every parameter (no adapter)
    """

    kind: Literal["full"] = "full"
