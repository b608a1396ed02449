"""One Ray for all tests of this folder; without Ray they are skipped."""

from __future__ import annotations

import pytest

from tests.ray.testbed import RayCluster


@pytest.fixture(scope="session")
def cluster():
    pytest.importorskip("ray.job_submission", reason="needs Ray: pip install 'train-launcher[ray]'")
    cluster = RayCluster(nodes=2)
    yield cluster
    cluster.close()
