"""Tests that need a Slurm have one, or are skipped with the reason."""

from __future__ import annotations

import pytest

from tests.slurm.testbed import Unavailable, install


@pytest.fixture(scope="session", autouse=True)
def _slurm() -> None:
    try:
        install()
    except Unavailable as error:
        pytest.skip(str(error))
