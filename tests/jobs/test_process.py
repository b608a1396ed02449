"""A job that is a process here: a pid counts with its start, and how it ended is told from the ledger."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.jobs.asking import summaries
from launcher.jobs.job import Job
from launcher.jobs.spec import JobSpec, Rendered
from launcher.jobs.submissions import record
from launcher.jobs.submit import require_idle
from launcher.jobs.targets import find, process
from launcher.recipe.schema import Cluster
from launcher.run.control import request_stop
from launcher.run.directory import RunDirectory
from launcher.run.lease import Submission, hold_lease
from launcher.run.ledger import end_attempt, start_attempt
from launcher.run.processes import boot_id, lives, start_of
from launcher.run.state import write_state
from tests.jobs.make import until
from tests.run.make import make_run

SPEC = JobSpec(name="demo", run="/runs/demo", cluster=Cluster(nproc_per_node=2))


@pytest.fixture
def script(tmp_path):
    """Start a script as a job; it is ended with the test."""
    started: list[Job] = []

    def start(text: str, spec: JobSpec = SPEC) -> Job:
        folder = tmp_path / f"submission-{len(started) + 1}"
        folder.mkdir()
        (folder / "job.sh").write_text(text)
        run = make_run(tmp_path / "runs", f"demo-{len(started)}")
        spec = replace(spec, run=str(run.path))
        started.append(process.start(spec, Rendered({"job.sh": text}, "bash job.sh"), folder, target="torchrun"))
        return started[-1]

    yield start
    for job in started:
        if process._lives(job):
            os.killpg(int(job.more["pid"]), signal.SIGKILL)


def over(job: Job) -> bool:
    return process.status(job).state not in ("starting", "running")


def test_a_job_outlives_what_started_it_in_a_session_of_its_own_and_its_output_is_kept(script):
    job = script("echo $LAUNCHER_JOB_ID; ps -o sid= -p $$; sleep 60")
    assert process.status(job).state == "starting"
    assert process.status(job).nodes == socket.gethostname()
    lines = until("two lines", lambda: found if len(found := list(process.logs(job))) == 2 else None)
    assert lines[0] == job.id
    assert lines[1].strip() == job.more["pid"]


def test_a_pid_that_is_used_again_is_neither_alive_nor_killed(script):
    job = script("sleep 60")
    other = replace(job, more={**job.more, "pid_start": "1"})
    assert process.status(other).state == "failed"
    with pytest.raises(UserError, match="has ended: nothing to cancel"):
        process.cancel(other)
    assert process.status(job).state == "starting"
    assert lives(os.getpid(), start_of(os.getpid()))


def test_a_job_that_had_ended_before_it_was_looked_at_is_over(script):
    job = script("true")
    assert not process._lives(replace(job, more={**job.more, "pid_start": ""}))


@pytest.mark.parametrize("other", [{"boot_id": "another"}, {"boot_id": "", "host": "another"}])
def test_a_job_of_another_machine_is_unknown_and_is_not_cancelled_from_here(script, other):
    assert boot_id()
    job = replace(script("sleep 60"), more={**script("true").more, **other, "host": "n7"})
    assert process.status(job).state == "unknown"
    assert "n7" in process.status(job).reason
    with pytest.raises(UserError, match="runs on n7, not here"):
        process.cancel(job)


@pytest.mark.parametrize(
    ("end", "state", "reason"),
    [
        ("finished", "finished", "attempt 1"), ("hang", "failed", "attempt 1: hang"),
        ("preemption", "cancelled", "attempt 1 stopped at step 4; `launcher submit"),
        ("cancelled", "cancelled", "attempt 1 stopped at step 4"), (None, "failed", "killed without a last word"),
    ],
)  # fmt: skip
def test_how_a_job_ended_is_what_the_ledger_says_of_it(script, end, state, reason):
    job = script("true")
    run = make_run(job.run.parent, job.run.name)
    start_attempt(run, target="torchrun", job_id=job.id, nodes=[], reason="worker")
    if end:
        end_attempt(run, 1, step=4, outcome_class=end)
    until("the end", lambda: over(job))
    assert process.status(job).state == state
    assert reason in process.status(job).reason


def test_a_worker_that_outlives_its_script_is_the_job_until_it_gives_the_lease_back(script, monkeypatch):
    job = script("true")
    run = RunDirectory(job.run)
    until("the end of the script", lambda: over(job))
    sent = []
    monkeypatch.setattr(process.os, "kill", lambda *signalled: sent.append(signalled))
    with hold_lease(run, submission=Submission(target="torchrun", job_id=job.id)):
        assert process.status(job).state == "starting"
        start_attempt(run, target="torchrun", job_id=job.id, nodes=[], reason="submitted")
        said = process.status(job)
        assert said.state == "running"
        assert said.reason.startswith(f"its script was killed; worker pid {os.getpid()} goes on and nothing starts it")
        (summary,) = summaries([(run, _remembered(run, job))])
        assert (summary["status"], summary["job"]["state"]) == ("running", "running")
        with pytest.raises(UserError, match=r"is submitted already: torchrun job .* is running"):
            require_idle(run, run.path)
        process.cancel(job)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert process.status(replace(job, id="another")).state == "failed"
    assert process.status(job).state == "failed"


def _remembered(run: RunDirectory, job: Job) -> Path:
    write_state(run, "running", attempt=1, step=1)
    record(run.path, job)
    return run.path


def test_a_job_of_another_namespace_of_pids_is_unknown(script):
    job = script("sleep 60")
    assert process.status(replace(job, more={**job.more, "pid_namespace": "pid:[1]"})).state == "unknown"


def test_a_job_that_ended_before_its_first_attempt_says_its_last_line(script):
    job = script("echo 'first'; echo 'HF_TOKEN: it is not set here' >&2; exit 1")
    until("the end", lambda: over(job))
    said = process.status(job)
    assert (said.state, said.reason) == ("failed", "ended before its first attempt: HF_TOKEN: it is not set here")


def test_cancel_before_the_first_attempt_is_cancelled(script):
    job = script("sleep 60")
    run = make_run(job.run.parent, job.run.name)  # of which an earlier job had reached the end
    end_attempt(run, start_attempt(run, target="torchrun", job_id="7", nodes=[], reason=""), step=6, outcome_class=None)
    run.data_file.write_text('{"total_steps": 6}')
    request_stop(run, "cancel by me@here")
    process.cancel(job)
    until("the end", lambda: over(job))
    assert process.status(job).state == "cancelled"
    assert "cancel by me@here" in process.status(job).reason


def test_variables_of_another_job_do_not_reach_this_one(script, monkeypatch):
    for name in ("LAUNCHER_ATTEMPT", "LAUNCHER_NODES", "LAUNCHER_NODE_RANK", "LAUNCHER_RENDEZVOUS"):
        monkeypatch.setenv(name, "1")
    job = script("env | grep -c -e ATTEMPT= -e LAUNCHER_NODE -e RENDEZVOUS || true")
    assert until("a line", lambda: list(process.logs(job))) == ["0"]


def test_several_nodes_are_refused_with_what_a_person_types_on_each(tmp_path):
    for name in ("torchrun", "accelerate"):
        target, spec = find(name), replace(SPEC, cluster=Cluster(nodes=2))
        with pytest.raises(UserError, match=r"cluster.nodes = 2: expected 1") as refused:
            target.submit(spec, target.render(spec), tmp_path)
        assert "on node 1: LAUNCHER_RENDEZVOUS=HOST:PORT bash node-1.sh" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_is_not_set_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("A_SECRET", raising=False)
    spec = replace(SPEC, cluster=Cluster(env=["A_SECRET"]))
    with pytest.raises(UserError, match=r"cluster.env: A_SECRET not set"):
        process.start(spec, Rendered({}, ""), tmp_path, target="torchrun")
    assert list(tmp_path.iterdir()) == []


def test_without_bash_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="bash is not on the PATH"):
        process.start(SPEC, Rendered({}, ""), tmp_path, target="torchrun")
    first = next(process.look(SPEC, Rendered({"job.sh": ""}, ""), package="torch"))
    assert (first.what, first.state) == ("bash -n", "skipped")


def test_validation_says_what_bash_and_this_machine_say(tmp_path):
    broken = Rendered({"job.sh": "if true; then\n"}, "bash job.sh")
    first, second, *_ = process.look(SPEC, broken, package="no-such-package")
    assert first.state == "bad"
    assert "job.sh" in first.text
    assert second.state == "skipped"


def test_output_that_is_gone_is_said(tmp_path):
    job = Job(target="torchrun", id="7", folder=Path("/nowhere"), run=tmp_path)
    with pytest.raises(UserError, match=r"/nowhere/job.out: the output of job 7 is not there"):
        list(process.logs(job))


# job.sh with stand-ins for what it starts: the loop alone

WORKER = """#!/bin/bash
n=$(( $(cat "$COUNT" 2>/dev/null || echo 0) + 1 )); echo $n > "$COUNT"
trap 'echo asked; printf "{\\"status\\": \\"preempted\\"}" > "$RUN/state.json"; exit 75' TERM
echo "start $n restart $LAUNCHER_JOB_RESTART id $LAUNCHER_JOB_ID target $LAUNCHER_TARGET"
codes=($CODES)
code=${codes[$((n - 1))]}
if [[ $code == wait ]]; then while true; do sleep 0.05; done; fi
printf '{"status": "%s"}' "${STATUS:-failed}" > "$RUN/state.json"
exit "$code"
"""


@pytest.fixture
def loop(tmp_path):
    """Run a rendered job.sh whose worker ends with the given codes; (exit code, output lines)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "launcher").write_text(WORKER)
    (tmp_path / "bin" / "launcher").chmod(0o755)
    (tmp_path / "run").mkdir()
    spec = replace(SPEC, run=str(tmp_path / "run"))
    (tmp_path / "job.sh").write_text(find("torchrun").render(spec).files["job.sh"])

    def start(codes: str, **more: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CODES": codes,
            "RUN": str(tmp_path / "run"), "COUNT": str(tmp_path / "count"), "LAUNCHER_JOB_ID": "j", **more,
        }  # fmt: skip
        return subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [("0", 0, 1), ("2", 2, 1), ("1", 1, 1), ("75 75 0", 0, 3), ("75 1", 1, 2), ("137", 137, 1)],
)
def test_the_script_starts_again_what_is_to_be_started_again_and_nothing_else(loop, codes, code, starts):
    process = loop(codes)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.splitlines() == [f"start {n + 1} restart {n} id j target torchrun" for n in range(starts)]


def test_a_stop_with_a_checkpoint_is_left_to_a_person(loop):
    process = loop("75 0", STATUS="preempted")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_script_asks_the_worker_and_nothing_is_started_after_it(loop, number):
    process = loop("wait 0")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("start 1")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.splitlines() == ["asked"]
