"""L10: whether a run is started again is decided by the class of its end, within budgets, and by its progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.jobs import restart
from launcher.jobs.ending import Ending
from launcher.jobs.restart import Start, by_class, concluded, decide, forget_stop, refusal
from launcher.jobs.supervisor import conclude
from launcher.recipe.schema.restart import Restart
from launcher.run.control import read_verdict, request_stop, stop_requested
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.files import read_lines
from launcher.run.ledger import attempts, end_attempt, start_attempt
from launcher.run.state import read_state
from tests.jobs.make import finish, launcher, project, ranks_of, run_of, until

LIMITS = Restart(node=2, communication=2, hang=1, unknown=1, no_progress=3)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "r")
    made.create({"cluster": {"restart": {"node": 2, "communication": 2, "unknown": 1, "no_progress": 3}}}, {}, {})
    return made


def begun(run: RunDirectory, *, job: str | None = "7", restart: int | None = 0, target: str = "slurm") -> int:
    return start_attempt(run, target=target, job_id=job, nodes=["a"], reason="worker", restart=restart)


def checkpoint(run: RunDirectory, step: int, attempt: int) -> None:
    folder = run.checkpoint(step, attempt)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def failed(kind: str, **more) -> Ending:
    return Ending(status="failed", failure_class=kind, message="m", **more)


@pytest.mark.parametrize(
    ("ending", "verdict", "why"),
    [
        (Ending(status="finished", step=9), "stop", "finished"),
        (Ending(status="cancelled", failure_class="cancelled", message="cancelled by ann"), "stop", "cancelled by ann"),
        (Ending(status="preempted", failure_class="preemption", step=4), "requeue", "with a checkpoint of step 4"),
        (Ending(status="preempted", failure_class="preemption"), "requeue", "before its first step"),
        (failed("user"), "stop", "user: another start would end the same way"),
        (failed("data"), "stop", "data: cluster.restart.data allows 0 restarts"),
        (failed("non_finite"), "stop", "non_finite: another start"),
        (failed("non_finite", rolls_back=True), "requeue", "non_finite: restart 1 of 3"),
        (failed("out_of_memory"), "stop", "out_of_memory: cluster.restart.out_of_memory allows 0 restarts"),
        (failed("node"), "requeue", "node: restart 1 of 2"),
        (failed("communication"), "requeue", "communication: restart 1 of 2"),
        (failed("hang"), "requeue", "hang: restart 1 of 1"),
        (failed("unknown"), "requeue", "unknown: restart 1 of 1"),
        (failed("unknown", for_good=True), "stop", "m"),
    ],
)
def test_l10_the_class_of_a_first_end_decides(run, ending, verdict, why):
    decision = decide(run, begun(run), ending, LIMITS)
    assert (decision.verdict, why in decision.why) == (verdict, True), decision


def starts(*ends: str, still: int = 0) -> list[Start]:
    """Starts that ended so, of which the last `still` left no newer checkpoint; `-` died without a word."""
    return [
        Start(i, "node" if end == "-" else end, silent=end == "-", progress=i <= len(ends) - still)
        for i, end in enumerate(ends, start=1)
    ]


@pytest.mark.parametrize(
    ("ended", "verdict", "why"),
    [
        (starts("unknown"), "requeue", "unknown: restart 1 of 1"),
        (
            starts("unknown", "unknown"),
            "stop",
            "unknown: cluster.restart.unknown allows 1 restart, used up by attempts 1 (unknown), 2 (unknown)",
        ),
        (starts("unknown", "preemption"), "requeue", "preemption"),
        (starts("unknown", "communication"), "requeue", "communication: restart 1 of 2"),
        (starts("communication", "preemption", "communication"), "requeue", "communication: restart 2 of 2"),
        (starts("communication", "communication", "preemption", "communication"), "stop", "used up by attempts 1"),
        (starts("-", "-", "node"), "stop", "1 (died without a word), 2 (died without a word), 3 (node)"),
        (starts("-", "unknown"), "requeue", "unknown: restart 1 of 1"),
        (starts("preemption", "preemption", "preemption", still=2), "requeue", "preemption"),
        (starts("preemption", "preemption", "preemption", still=3), "stop", "no progress: attempts 1 (preemption), 2"),
        (starts("node", "preemption", "-", "hang", still=3), "stop", "no progress: attempts 2 (preemption), 3 (died"),
    ],
)
def test_l10_budgets_are_by_class_and_starts_without_progress_are_counted_whatever_ended_them(ended, verdict, why):
    last = ended[-1].end
    ending = Ending(status="preempted", failure_class=last, step=1) if last == "preemption" else failed(last)
    decision = by_class(ending, LIMITS, ended)
    assert (decision.verdict, why in decision.why) == (verdict, True), decision


def test_a_budget_of_nought_is_no_restart_at_all():
    assert by_class(failed("unknown"), Restart(unknown=0)).verdict == "stop"


def crash(run: RunDirectory, number: int) -> str:
    attempt = begun(run, restart=number)
    return str(conclude(run, attempt, failed("unknown")).verdict)


def test_the_ledger_is_what_is_counted_and_says_why(run):
    assert [crash(run, number) for number in range(2)] == ["requeue", "stop"]
    assert [attempt.end_verdict for attempt in attempts(run)] == ["requeue", "stop"]
    assert "used up by attempts 1 (unknown), 2 (unknown)" in attempts(run)[1].end_why
    assert (read_verdict(run), read_state(run).status) == ("stop", "failed")


@pytest.mark.parametrize(
    "again",
    [
        {"job": "8", "restart": 0},
        {"job": "7", "restart": 0},  # a person inside the same allocation
        {"job": "7", "restart": 1, "target": "ray"},
    ],
)
def test_another_job_begins_a_new_count(run, again):
    assert [crash(run, number) for number in range(2)] == ["requeue", "stop"]
    assert concluded(run, begun(run, **again), failed("unknown")).verdict == "requeue"


def by_hand(run: RunDirectory, *, within: bool) -> int:
    return start_attempt(run, target=restart.BY_HAND, job_id="4711", nodes=["a"], reason="run", within=within)


def test_a_start_by_hand_is_counted_with_the_restarts_within_it_and_a_second_one_by_a_person_counts_afresh(run):
    first, second = (conclude(run, by_hand(run, within=i > 0), failed("unknown"), within=True) for i in range(2))
    assert (first.verdict, first.again, first.why) == ("requeue", True, "unknown: restart 1 of 1")
    assert (second.verdict, second.again, "used up by attempts 1" in second.why) == ("stop", False, True)
    assert conclude(run, by_hand(run, within=False), failed("unknown"), within=True).again  # the same pid, by chance


def test_restarts_of_the_scheduler_and_of_the_launcher_use_up_one_budget(run):
    for number, within in ((0, False), (0, True), (1, False), (1, True)):
        attempt = start_attempt(run, target="slurm", job_id="7", nodes=["a"], reason="r", restart=number, within=within)
        checkpoint(run, attempt, attempt)
        ending = conclude(run, attempt, failed("communication"), within=True)
        if attempt < 3:
            assert (ending.again, ending.why) == (True, f"communication: restart {attempt} of 2")
    assert "allows 2 restarts, used up by attempts 1 (communication), 2 (communication), 3" in ending.why


@pytest.mark.parametrize(
    ("ending", "enough", "again"),
    [
        (failed("communication"), False, True),
        (failed("hang"), False, True),
        (failed("unknown"), False, True),
        (failed("non_finite", rolls_back=True), False, True),
        (failed("non_finite"), False, False),
        (failed("node"), False, False),
        (failed("node"), True, True),
        (failed("user"), True, False),
        (failed("data"), True, False),
        (failed("out_of_memory"), True, False),
        (failed("unknown", for_good=True), True, False),
        (Ending(status="preempted", failure_class="preemption", step=3), True, False),
        (Ending(status="finished", step=9), True, False),
    ],
)
def test_l10_the_launcher_makes_the_next_start_itself_where_no_scheduler_has_to(run, ending, enough, again):
    attempt = begun(run)
    assert not concluded(run, attempt, ending, enough=enough).again
    assert concluded(run, attempt, ending, within=True, enough=enough).again is again


def test_a_stop_that_was_asked_for_leaves_the_next_start_to_the_scheduler(run):
    attempt = begun(run)
    request_stop(run, "time limit")
    ending = conclude(run, attempt, failed("communication"), within=True)
    assert (ending.again, ending.verdict, read_verdict(run), stop_requested(run)) == (
        False,
        "requeue",
        "requeue",
        False,
    )


def test_while_the_launcher_goes_on_there_is_no_verdict_and_a_stop_request_stays(run):
    ending = conclude(run, begun(run), failed("communication"), within=True)
    request_stop(run, "time limit")
    assert (ending.again, read_verdict(run), read_state(run).status) == (True, None, "restarting")
    attempt = start_attempt(run, target="slurm", job_id="7", nodes=["a"], reason="r", restart=0, within=True)
    forget_stop(run, attempt)
    assert (refusal(run, attempt), stop_requested(run)) == (None, True)


def test_a_cancel_between_two_starts_ends_the_job(run):
    ending = conclude(run, begun(run), failed("communication"), within=True)
    request_stop(run, "cancelled by ann")
    ending = restart.asked_to_stop(run, ending, "cancelled by ann")
    assert (ending.status, ending.verdict, ending.again) == ("cancelled", "stop", False)


def test_the_pause_is_none_after_progress_and_doubles_up_to_its_limit_without():
    limits = Restart(backoff_s=5, backoff_max_s=30)
    assert [restart.pause_s(idle, limits) for idle in range(6)] == [0, 5, 10, 20, 30, 30]
    assert restart.pause_s(10_000, limits) == 30
    assert restart.pause_s(1, Restart(backoff_s=0.0)) == 0


def test_the_pause_grows_with_the_starts_in_a_row_that_left_no_newer_checkpoint(run):
    run.write_recipe({"cluster": {"restart": {"no_progress": 9, "backoff_s": 1, "unknown": 9}}})
    checkpoint(run, 5, begun(run))
    pauses = [conclude(run, 1, failed("unknown"), within=True).pause_s]
    for _ in range(3):
        attempt = start_attempt(run, target="slurm", job_id="7", nodes=["a"], reason="r", restart=0, within=True)
        pauses.append(conclude(run, attempt, failed("unknown"), within=True).pause_s)
    assert pauses == [0, 1, 2, 4]


def test_the_first_failing_rank_is_named_in_the_end_line(run):
    ending = failed("unknown", step=7, rank=1, node="a", rank_step=6, traceback="x" * 9000 + "the end", time=12.5)
    first = attempts(run)[0].end_first if conclude(run, begun(run), ending) else None
    assert first is not None
    assert (first.rank, first.node, first.step, first.failure_class) == (1, "a", 6, "unknown")
    assert (first.message, first.time, first.traceback[-7:], len(first.traceback)) == ("m", 12.5, "the end", 4000)


def test_progress_is_a_newer_checkpoint_than_the_one_before(run):
    for number, step in enumerate((5, 5, 9, 9, 9)):
        attempt = begun(run, restart=number)
        if step not in {ref.step for ref in restart.valid_checkpoints(run)}:
            checkpoint(run, step, attempt)
        ending = conclude(run, attempt, Ending(status="preempted", failure_class="preemption", step=step))
        assert ending.verdict == "requeue"
    ending = conclude(run, begun(run, restart=5), Ending(status="preempted", failure_class="preemption", step=9))
    assert (ending.verdict, ending.worker_exit_code) == ("stop", 1)
    assert ending.why.startswith("no progress: attempts 4 (preemption), 5 (preemption), 6 (preemption)")


def test_attempts_that_died_without_a_word_count_and_a_restart_past_the_budget_ends_at_once(run):
    for number in range(3):
        attempt = begun(run, restart=number)
        checkpoint(run, 5 * attempt, attempt)
        assert refusal(run, attempt) is None
    attempt = begun(run, restart=3)
    ending = refusal(run, attempt)
    assert ending is not None
    ending = conclude(run, attempt, ending)
    silent = "1 (died without a word), 2 (died without a word), 3 (died without a word)"
    assert f"cluster.restart.node allows 2 restarts, used up by attempts {silent}" in ending.message
    assert (ending.verdict, ending.worker_exit_code, read_verdict(run)) == ("stop", 1, "stop")
    assert refusal(run, begun(run, job="8")) is None


def test_silent_deaths_without_progress_end_a_restart_at_once(run):
    for number in range(3):
        begun(run, restart=number)
    run.write_recipe({"cluster": {"restart": {"node": 10, "no_progress": 3}}})
    ending = refusal(run, begun(run, restart=3))
    assert ending is not None
    assert "no progress: attempts 1 (died" in ending.message


def test_a_job_requeued_by_a_person_after_a_mistake_may_train(run):
    conclude(run, begun(run), failed("user"))
    assert refusal(run, begun(run, restart=1)) is None


@pytest.mark.parametrize(
    "ending",
    [
        Ending(status="preempted", failure_class="preemption", step=3),
        failed("unknown", traceback="killed"),
        failed("communication"),
    ],
)
def test_a_cancelled_run_stays_cancelled_however_its_ranks_ended(run, ending):
    attempt = begun(run)
    request_stop(run, "cancelled by ann on login1")
    ending = conclude(run, attempt, ending)
    assert (ending.status, ending.verdict, ending.worker_exit_code) == ("cancelled", "stop", 1)
    assert (attempts(run)[0].end_class, attempts(run)[0].end_why) == ("cancelled", "cancelled by ann on login1")
    assert (read_state(run).status, read_verdict(run)) == ("cancelled", "stop")


@pytest.mark.parametrize("ending", [Ending(status="finished", step=9), failed("user"), failed("out_of_memory")])
def test_what_ended_by_itself_is_not_called_cancelled(run, ending):
    request_stop(run, "cancelled")
    assert conclude(run, begun(run), ending).status == ending.status


def test_a_cancel_outlives_the_death_of_a_node_but_not_a_new_submission(run):
    begun(run)
    request_stop(run, "cancelled by ann")
    again = begun(run, restart=1)
    forget_stop(run, again)
    ending = refusal(run, again)
    assert ending is not None
    assert (ending.status, stop_requested(run)) == ("cancelled", True)
    new = begun(run, job="8")
    forget_stop(run, new)
    assert (refusal(run, new), stop_requested(run)) == (None, False)


def test_other_stop_requests_are_forgotten_by_the_next_start(run):
    begun(run)
    request_stop(run, "time limit")
    forget_stop(run, begun(run, restart=1))
    assert not stop_requested(run)


def test_a_ledger_that_cannot_be_read_leaves_the_class_to_decide(run):
    begun(run)
    run.ledger_file.unlink()
    run.ledger_file.mkdir()
    assert concluded(run, 1, failed("node")).verdict == "requeue"
    assert concluded(run, 1, failed("user")).verdict == "stop"


def test_a_recipe_from_before_these_keys_has_their_defaults(run):
    run.write_recipe({"cluster": {"nodes": 1}})
    assert restart._limits(run) == Restart()


def test_an_old_ledger_without_verdicts_is_read(run):
    run.ledger_file.write_text(json.dumps({"kind": "start", "attempt": 1, "job_id": "7", "target": "slurm"}) + "\n")
    end_attempt(run, 1, step=3, outcome_class="communication")
    assert concluded(run, begun(run, restart=1), failed("communication")).why == "communication: restart 2 of 2"


@pytest.mark.gloo
def test_l10_a_run_that_crashes_is_started_again_until_its_budget_is_used_up(tmp_path: Path):
    """A rank is killed at some step of each attempt: first by hand without a budget, then as a scheduler's job."""
    budgets = {"unknown": 2, "backoff_s": 0, "no_progress": 9}
    recipe = project(tmp_path, train={"max_steps": 100_000}, cluster={"nproc_per_node": 1, "restart": budgets})
    run = run_of(recipe)
    process = launcher("run", recipe, "cluster.restart.unknown=0")
    kill_the_rank(run, process, attempt=1)
    finish(process, code=1)
    job = {"LAUNCHER_TARGET": "slurm", "LAUNCHER_JOB_ID": "7", "LAUNCHER_JOB_RESTART": "0"}
    process = launcher("worker", run.path, "--recipe", recipe, env=job)
    for attempt in (2, 3, 4):
        kill_the_rank(run, process, attempt=attempt)
    out, _ = finish(process, code=1)
    assert [attempt.end_verdict for attempt in attempts(run)] == ["stop", "requeue", "requeue", "stop"]
    assert [attempt.within for attempt in attempts(run)] == [False, False, True, True]
    assert "cluster.restart.unknown allows 2 restarts, used up by attempts 2 (unknown), 3" in attempts(run)[-1].end_why
    assert "verdict: stop (unknown: cluster.restart.unknown allows 2 restarts" in out

    process = launcher("worker", run.path, env={**job, "LAUNCHER_JOB_RESTART": "9"})
    out, _ = finish(process, code=1)
    assert "not started again: unknown: cluster.restart.unknown allows 2 restarts" in out


def kill_the_rank(run: RunDirectory, process: subprocess.Popen[str], *, attempt: int) -> None:
    """Kill the one rank of an attempt once it has logged a step."""

    def logged() -> bool:
        newest = max((line.get("attempt") or 0 for line in read_lines(run.metrics_file)), default=0)
        return newest == attempt or process.poll() is not None

    until("a step of the attempt", logged, timeout_s=600)
    assert process.poll() is None, process.communicate()
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)


def test_a_rollback_that_leaves_another_batch_out_is_no_start_without_progress(run):
    from launcher.run.left_out import LeftOut, leave_out

    rolled = Ending(status="failed", failure_class="non_finite", rolls_back=True)
    limits = Restart(non_finite=3, no_progress=2)
    for number in (1, 2, 3):
        attempt = start_attempt(run, target="slurm", job_id="7", restart=number - 1, nodes=1, reason="run")
        leave_out(run, LeftOut(step=10 + number, attempt=attempt, reason="spike"))
        assert restart.decide(run, attempt, rolled, limits).verdict == "requeue"
        end_attempt(run, attempt, step=10, outcome_class="non_finite")
    attempt = start_attempt(run, target="slurm", job_id="7", restart=3, nodes=1, reason="run")
    leave_out(run, LeftOut(step=20, attempt=attempt, reason="spike"))
    decision = restart.decide(run, attempt, rolled, limits)
    assert decision.verdict == "stop"
    assert "cluster.restart.non_finite allows 3" in decision.why
