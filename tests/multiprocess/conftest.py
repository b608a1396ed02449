"""Two machines on this one, for tests of several nodes: network namespaces with a cable between them."""

from __future__ import annotations

import pytest

from tests import netns
from tests.netns import Machines


@pytest.fixture(scope="module")
def machines():
    netns.require()
    with Machines(2) as made:
        yield made
