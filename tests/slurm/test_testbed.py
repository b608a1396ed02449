"""The throw-away Slurm is a good guest: several fit on one machine, and nothing is left of them, of killed ones too."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.make import descendants, lives, until
from tests.slurm import testbed
from tests.slurm.testbed import FREEZER, Slurm, Unavailable, output, slurm

pytestmark = pytest.mark.gloo


def things_of(cluster: Slurm) -> list[str]:
    """Interfaces, mounts, control groups and files that carry a cluster's name."""
    links = re.findall(rf"{cluster.bridge}\S*", output("ip", "-o", "link"))
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(cluster.folder) in line]
    places = [str(place) for place in (cluster.folder, FREEZER / cluster.bridge) if place.exists()]
    return links + mounts + places


def test_two_clusters_stand_side_by_side_and_leave_nothing():
    before = set(descendants(os.getpid()))
    with slurm(nodes=2) as one, slurm(nodes=2) as other:
        job = other.command("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=sleep 600")
        other.wait_for(job, "RUNNING")
        assert one.command("squeue", "--noheader") == ""
        told = one.command(
            "srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES"
        )
        assert sorted(told.splitlines()) == ["node1 0,1", "node2 0,1"]
        processes = set(descendants(os.getpid())) - before
    assert not [pid for pid in processes if lives(pid)]
    assert things_of(one) == things_of(other) == []


def test_a_node_whose_daemon_dies_keeps_its_work_and_comes_back():
    with slurm(nodes=1) as cluster:
        job = cluster.command("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600")
        cluster.wait_for(job, "RUNNING")
        until("the job there", lambda: cluster.runs("node1", "slurmstepd"))
        cluster.cut("node1", "daemon")
        assert not cluster.runs("node1", "slurmd")
        assert cluster.runs("node1", "slurmstepd")
        cluster.heal("node1")
        assert cluster.job(job)["JobState"] == "RUNNING"


def test_what_a_killed_owner_left_is_removed_by_the_next():
    """Its processes die with it; bridge, control groups and files wait for the next cluster of this machine."""
    code = """
from tests.slurm.testbed import slurm
with slurm(nodes=1) as cluster:
    print(cluster.bridge, cluster.folder, flush=True)
    input()
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout is not None
    bridge, folder = owner.stdout.readline().split()
    processes = descendants(owner.pid)
    assert len(processes) >= 3
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    until("its processes gone", lambda: not any(map(lives, processes)))
    with slurm(nodes=1):
        assert not Path(folder).exists()
        assert bridge not in output("ip", "-o", "link")
        assert not (FREEZER / bridge).exists()


def test_a_machine_with_cgroup_v2_alone_will_do(monkeypatch):
    monkeypatch.setattr(testbed, "FREEZER", Path("/sys/fs/cgroup/freezer-is-not-here"))
    with slurm(nodes=1) as cluster:
        assert "linuxproc" in cluster.command("scontrol", "show", "config")
        job = cluster.command("sbatch", "--parsable", "--output=/dev/null", "--wrap=srun hostname")
        cluster.wait_for(job, "COMPLETED")


def test_a_machine_that_cannot_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="needs root"), slurm():
        pass
