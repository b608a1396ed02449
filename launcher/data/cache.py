"""Which folder tokenised data and stores are kept in."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.recipe.schema import Recipe


def cache_folder(recipe: Recipe) -> Path:
    """Where stores lie: data.cache_dir, else LAUNCHER_CACHE, else ~/.cache/launcher."""
    return (
        Path(recipe.data.cache_dir or os.environ.get("LAUNCHER_CACHE") or "~/.cache/launcher").expanduser().absolute()
    )
