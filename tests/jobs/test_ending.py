"""How an attempt's end is judged from its ranks' words and deaths, and the exit codes that say so."""

from __future__ import annotations

import pytest

from launcher.jobs.ending import Ending, judge
from launcher.run.control import Outcome


def failed(failure_class: str, step: int = 3, message: str = "m") -> Outcome:
    return Outcome("failed", failure_class, step, message, "traceback", "host")


TWO = range(2)


def test_all_finished_is_finished_with_code_0():
    ending = judge({0: Outcome("finished", step=9), 1: Outcome("finished", step=9)}, {}, ranks=TWO)
    assert (ending.status, ending.step, ending.exit_code) == ("finished", 9, 0)


def test_stopped_is_preempted_with_code_75():
    ending = judge({0: Outcome("stopped", step=4), 1: Outcome("stopped", step=4)}, {}, ranks=TWO)
    assert (ending.status, ending.step, ending.exit_code) == ("preempted", 4, 75)


def test_the_cause_is_the_rank_that_failed_by_itself_not_the_one_that_lost_its_peer():
    ending = judge({0: failed("communication"), 1: failed("out_of_memory", message="too big")}, {}, ranks=TWO)
    assert (ending.rank, ending.failure_class, ending.message) == (1, "out_of_memory", "too big")
    assert ending.exit_code == 1


def test_a_killed_rank_is_the_cause_though_its_peer_complains_of_the_network():
    ending = judge({1: failed("communication")}, {0: "killed by SIGKILL"}, ranks=TWO)
    assert (ending.rank, ending.failure_class) == (0, "unknown")
    assert ending.message == "rank 0 said nothing before its end: killed by SIGKILL"


def test_a_rank_that_the_kernel_killed_for_want_of_memory_is_out_of_memory():
    how = "killed by SIGKILL (memory ran out: the kernel ended 1 process here meanwhile)"
    assert judge({0: failed("communication")}, {1: how}, ranks=TWO).failure_class == "out_of_memory"


def test_an_error_without_a_class_is_the_cause_before_its_peers_lost_connections():
    ending = judge({0: failed("communication"), 1: failed("unknown", message="a bug")}, {1: "exit code 1"}, ranks=TWO)
    assert (ending.rank, ending.message) == (1, "a bug")


def test_a_lost_connection_alone_is_the_cause():
    ending = judge({0: failed("communication"), 1: failed("communication")}, {0: "exit code 1"}, ranks=TWO)
    assert (ending.failure_class, ending.exit_code) == ("communication", 1)


def test_a_users_error_on_a_rank_ends_with_code_2():
    ending = judge({0: failed("user"), 1: failed("communication")}, {}, ranks=TWO)
    assert ending.exit_code == 2


def test_a_rank_without_a_word_is_a_failure_even_if_its_process_ended_well():
    ending = judge({0: Outcome("finished", step=9)}, {}, ranks=TWO)
    assert (ending.status, ending.rank, ending.exit_code) == ("failed", 1, 1)


@pytest.mark.parametrize(("kind", "status"), [("finished", "finished"), ("stopped", "preempted")])
def test_a_single_rank_speaks_for_itself(kind, status):
    assert judge({0: Outcome(kind, step=1)}, {}, ranks=range(1)).status == status


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (Ending(status="finished", verdict="stop"), 0),
        (Ending(status="preempted", failure_class="preemption", verdict="requeue"), 75),
        (Ending(status="preempted", failure_class="preemption", verdict="stop"), 1),
        (Ending(status="failed", failure_class="communication", verdict="requeue"), 75),
        (Ending(status="failed", failure_class="communication", verdict="stop"), 1),
        (Ending(status="failed", failure_class="user", verdict="stop"), 2),
        (Ending(status="cancelled", failure_class="cancelled", verdict="stop"), 1),
        (Ending(status="failed", failure_class="communication"), 1),
        (Ending(status="preempted", failure_class="preemption"), 75),
    ],
)
def test_the_worker_ends_with_75_whenever_it_is_to_be_started_again(ending, code):
    assert ending.worker_exit_code == code
