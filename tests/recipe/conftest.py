"""Recipe tests run in an empty folder, without the presets of whoever runs them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a test; relative paths in recipes start here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCHER_CLUSTER", raising=False)
    monkeypatch.delenv("LAUNCHER_PRESETS", raising=False)
    return tmp_path
