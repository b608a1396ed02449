"""Slurm's words in our states: what squeue, sacct and scontrol of several releases print, read as text.

22.05.8 was recorded on a real Slurm; the lines of other releases are written after their manuals and sources, since
they cannot run here.
"""

from __future__ import annotations

import pytest

from launcher.jobs.targets import slurm_states
from launcher.jobs.targets.slurm_states import Told, from_sacct, from_scontrol, from_squeue, status

SQUEUE = {
    "22.05 array and others": (
        "1|CANCELLED|BeginTime|\n18|PENDING|BeginTime|\n23_[0-1,4-6%2]|PENDING|Resources|\n23_2|RUNNING|None|node2\n",
        {
            "1": ("CANCELLED", ""), "23_2": ("RUNNING", "node2"), "23_1": ("PENDING", ""), "23_5": ("PENDING", ""),
            "23_3": None, "2": None, "23": None,
        },
    ),
    "23.11 one waiting element": ("23_7|PENDING|JobArrayTaskLimit|\n", {"23_7": ("PENDING", "")}),
    "24.05 of another cluster": (
        "CLUSTER: far\n99|RUNNING|None|gpu[001-064]\n", {"99": ("RUNNING", "gpu[001-064]")},
    ),
    "20.11 forgotten": ("", {"7": None}),
}  # fmt: skip

SACCT = {
    "20.11 requeued: a line a start": (
        "12|PREEMPTED|0:0|a[1-2]\n12|NODE_FAIL|1:0|a[1-2]\n12|COMPLETED|0:0|a[3-4]\n", "12", "COMPLETED",
    ),
    "22.05 cancelled by a user": ("12|CANCELLED by 1000|0:0|a1\n", "12", "CANCELLED by 1000"),
    "23.02 a column too narrow": ("12|CANCELLED+|0:0|a1\n", "12", "CANCELLED+"),
    "23.11 an element": ("12_3|OUT_OF_MEMORY|0:125|a1\n12_4|RUNNING|0:0|a2\n", "12_3", "OUT_OF_MEMORY"),
    "24.11 elements that wait": ("12_[5-9]|PENDING|0:0|None assigned\n", "12_7", "PENDING"),
}  # fmt: skip

SCONTROL_22_05 = (
    "JobId=25 ArrayJobId=23 ArrayTaskId=1 JobName=tiny UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=429490 "
    "Nice=0 Account=(null) QOS=(null) JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:03 TimeLimit=365-00:00:00 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList= BatchHost=node2 NumNodes=1 Comment=JobState=FAILED \n"
)
SCONTROL_24_05 = (
    "JobId=31 JobName=big UserId=a(1000) GroupId=a(1000) MCS_label=N/A Priority=1 Nice=0 Account=x QOS=normal "
    "JobState=TIMEOUT Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15 "
    "SLUID=sA1 NodeList=gpu[1-2] StdOut=/x/slurm-31.out\n"
)


@pytest.mark.parametrize("release", SQUEUE)
def test_lines_of_squeue(release):
    out, expected = SQUEUE[release]
    found = {job: from_squeue(out, job) for job in expected}
    assert {job: told and (told.state, told.nodes) for job, told in found.items()} == expected


@pytest.mark.parametrize("release", SACCT)
def test_lines_of_sacct_of_which_the_last_start_counts(release):
    out, job, state = SACCT[release]
    told = from_sacct(out, job)
    assert told is not None
    assert told.state == state


def test_lines_of_scontrol():
    assert from_scontrol(SCONTROL_22_05, "23_1") == Told(
        state="PENDING", reason="BeginTime", exit_code="0:0", restarts=2, job="23_1"
    )
    assert from_scontrol(SCONTROL_22_05, "25") is not None
    assert from_scontrol(SCONTROL_22_05, "23_2") is None
    told = from_scontrol(SCONTROL_24_05, "31")
    assert told is not None
    assert (told.state, told.nodes, told.exit_code) == ("TIMEOUT", "gpu[1-2]", "0:15")


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (Told("PENDING", "Priority"), "queued"),
        (Told("PENDING", "Resources", restarts=0), "queued"),
        (Told("PENDING", "BeginTime", restarts=1), "preempted-will-return"),
        (Told("PENDING", "JobHeldAdmin", restarts=5), "queued"),
        (Told("REQUEUE_HOLD"), "queued"),
        (Told("REQUEUED"), "preempted-will-return"),
        (Told("CONFIGURING"), "starting"),
        (Told("RUNNING", restarts=3), "running"),
        (Told("COMPLETING"), "running"),
        (Told("SUSPENDED"), "running"),
        (Told("COMPLETED"), "finished"),
        (Told("PREEMPTED"), "preempted-will-return"),
        (Told("NODE_FAIL"), "preempted-will-return"),
        (Told("FAILED", exit_code="1:0"), "failed"),
        (Told("TIMEOUT"), "failed"),
        (Told("OUT_OF_MEMORY"), "failed"),
        (Told("DEADLINE"), "failed"),
        (Told("CANCELLED"), "cancelled"),
        (Told("CANCELLED by 1000"), "cancelled"),
        (Told("CANCELLED+"), "cancelled"),
        (Told("A_STATE_OF_TOMORROW"), "unknown"),
    ],
)
def test_states(told, state):
    assert status(told, requeue=True).state == state


@pytest.mark.parametrize("word", ["PREEMPTED", "NODE_FAIL", "BOOT_FAIL"])
def test_without_requeue_a_lost_job_has_failed(word):
    assert status(Told(word), requeue=False).state == "failed"


def test_the_reason_is_in_slurms_words():
    assert status(Told("PENDING", "Priority", "(null)"), requeue=True).reason == "PENDING, Priority"
    assert status(Told("RUNNING", "None", "a[1-2]"), requeue=True) == slurm_states.JobStatus(
        "running", "RUNNING", "a[1-2]"
    )
    assert status(Told("FAILED", "NonZeroExitCode", exit_code="2:0"), requeue=True).reason == (
        "FAILED, NonZeroExitCode, exit code 2:0"
    )
    held = status(Told("PENDING", "JobHeldAdmin", restarts=5, job="7"), requeue=True).reason
    assert held == "PENDING, JobHeldAdmin, restart 5, held; scontrol release 7 lets it go on"


class Answers:
    """What each command answers, and which were asked."""

    def __init__(self, **answers: tuple[int, str, str]) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, command):
        self.asked.append(" ".join(command))
        return self.answers.get(command[0], (1, "", ""))


def test_many_jobs_are_asked_about_at_once_and_never_as_json():
    answers = Answers(squeue=(0, "1|RUNNING|None|a1\n2|RUNNING|None|a2\n", ""))
    found = slurm_states.ask(["1", "2"], cluster="far", run=answers)
    assert [told.nodes for told in found.values()] == ["a1", "a2"]
    assert answers.asked == ["squeue -M far --noheader --states=all --jobs=1,2 --format=%i|%T|%r|%N"]
    assert not any("json" in line for line in answers.asked)


def test_a_waiting_job_is_looked_at_for_its_restarts():
    answers = Answers(squeue=(0, "23_[1-2]|PENDING|BeginTime|\n", ""), scontrol=(0, SCONTROL_22_05, ""))
    assert slurm_states.ask(["23_1"], cluster=None, run=answers)["23_1"].restarts == 2


def test_without_accounting_scontrol_tells():
    answers = Answers(
        squeue=(1, "", "slurm_load_jobs error: Invalid job id specified\n"),
        sacct=(1, "", "Slurm accounting storage is disabled\n"),
        scontrol=(0, SCONTROL_24_05, ""),
    )
    assert slurm_states.ask(["31"], cluster=None, run=answers)["31"].state == "TIMEOUT"


def test_a_job_that_nobody_knows_is_unknown_with_what_they_said():
    answers = Answers(
        squeue=(1, "", "slurm_load_jobs error: Invalid job id specified\n"),
        sacct=(127, "", "sacct: not on PATH"),
        scontrol=(1, "", ""),
    )
    told = slurm_states.ask(["31"], cluster=None, run=answers)["31"]
    assert status(told, requeue=True) == slurm_states.JobStatus(
        "unknown",
        "squeue: slurm_load_jobs error: Invalid job id specified; sacct: sacct: not on PATH; scontrol: exit code 1",
    )
