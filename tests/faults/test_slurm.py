"""F14 on a real Slurm (tests/slurm), installed for it; where that cannot be, the test is skipped and says why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from launcher.run.ledger import attempts, valid_checkpoints
from tests.slurm.make import STEPS, Site, story
from tests.slurm.testbed import Unavailable, install, slurm

pytestmark = [pytest.mark.gloo, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    try:
        install()
    except Unavailable as error:
        pytest.skip(str(error))
    with slurm(cpus=32) as cluster:
        yield Site(cluster, tmp_path_factory.mktemp("slurm"))


def test_F14_slurm_s_signal_before_the_time_limit_saves_and_the_requeued_job_ends_exactly(site):
    """F14: USR1 as Slurm sends it before the time limit, to the batch script alone: checkpoint, requeue, and the same
    job resumes by itself, to losses, weights and moments that are bit-equal."""
    site.hold("warned")
    job = site.submit("warned")
    site.wait_until_held("warned", job)
    site.cluster.command("scancel", "--batch", "--signal=USR1", job)
    site.wait_for(job, "PENDING", "REQUEUED")
    site.release("warned")
    run = site.run("warned")
    assert valid_checkpoints(run)[-1].step not in (0, 4, 8, STEPS)
    assert site.status("warned") == ("preempted", "preempted-will-return")
    site.wait_for(job, "COMPLETED")
    site.assert_exact("warned")
    assert story(run) == [(1, 0, "preemption"), (2, 1, "finished")]
    assert {attempt.job_id for attempt in attempts(run)} == {job}
    assert "preemption" in site.call("status", run.path, "--history")
