"""What the tests of faults share: the shim under processes that a test starts, and under ranks of the fork server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest

from tests import ranks
from tests.faults.shim import Shim, compiled


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library of the shim, made once."""
    library = compiled(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("no C compiler here: the fault-injecting file layer cannot be made")
    return library


@pytest.fixture(scope="session")
def _shim_of_the_session(shim_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(shim_library, tmp_path_factory.mktemp("shim-control"))


@pytest.fixture
def shim(_shim_of_the_session: Shim) -> Iterator[Shim]:
    """The shim without any fault; whatever a test sets is taken away after it."""
    _shim_of_the_session.clear()
    yield _shim_of_the_session
    _shim_of_the_session.clear()


@pytest.fixture(scope="session")
def _shimmed_server(_shim_of_the_session: Shim) -> None:
    """From here on the fork server of this session has the shim under it; without a fault it does nothing."""
    with contextlib.suppress(AttributeError):
        forkserver._forkserver._stop()  # the one that runs has none
    ranks.context()
    with mock.patch.dict(os.environ, _shim_of_the_session.environment()):
        forkserver.ensure_running()


@pytest.fixture
def shimmed(_shimmed_server: None, shim: Shim) -> Shim:
    """The shim under every rank that is started from the fork server (tests.ranks, launcher.jobs.supervisor.launch)."""
    return shim
