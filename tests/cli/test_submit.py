"""`submit` and `cancel`, and what other verbs say of submitted jobs, on a scheduler that is a dict."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import Problem
from launcher.jobs import targets
from launcher.jobs.job import ACTIVE, Finding, JobStatus
from launcher.jobs.submissions import one_at_a_time
from launcher.run.control import stop_reason
from launcher.run.directory import RunDirectory
from launcher.run.ledger import end_attempt, start_attempt
from launcher.run.state import write_state
from tests.cli import fake_target as fake
from tests.run.make import Script

RECIPE = """
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                 num_attention_heads: 2, vocab_size: 400}, tokenizer: tokenizer}
data: {train: [{path: data.jsonl, format: messages}], seq_len: 64}
train: {global_batch_size: 4, max_steps: 6}
cluster: {target: slurm, accelerator: cpu}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe whose target is the fake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("slurm", "kubernetes", "ray"):
        monkeypatch.setitem(targets.TARGETS, name, "tests.cli.fake_target")
    fake.reset()
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "demo.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def call(here, capsys):
    """Call the command line; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return left.value.code, *capsys.readouterr()

    return run


def said(state, reason="", nodes=""):
    """Let the scheduler answer so from now on."""
    fake.answers[:] = [JobStatus(state, reason, nodes)]


def attempt(run, *, job_id="j1", target="slurm", step=None, ended=None, verdict=None, why=""):
    """One start of a job in the ledger."""
    number = start_attempt(run, target=target, job_id=job_id, nodes=["n1", "n2"], reason="submitted")
    if ended:
        end_attempt(run, number, step=step, outcome_class=ended, verdict=verdict, why=why)
    return number


def test_submit_hands_over_exactly_what_render_shows_and_remembers_the_job(here, call):
    shown = json.loads(call("render", "demo.yaml", "--json")[1])
    code, out, _ = call("submit", "demo.yaml")
    assert code == 0
    folder = here / "runs" / "demo" / "job" / "submission-1"
    assert {name: (folder / name).read_text() for name in shown["files"]} == shown["files"]
    assert {file.name for file in folder.iterdir()} - set(shown["files"]) <= {"provenance.json", "dirty.patch"}
    for part in (
        f"submitted {here / 'runs' / 'demo'}: slurm job j1",
        str(folder),
        "launcher status",
        "launcher cancel",
    ):
        assert part in out
    assert RunDirectory(here / "runs" / "demo").exists()  # so that it is listed while it waits
    (line,) = (folder.parent / "submissions.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "j1"
    assert json.loads(line)["files"] == list(shown["files"])


def test_submit_as_json_is_one_object(here, call):
    fake.findings[:] = [Finding("look", "skipped", "it is not here")]
    code, out, _ = call("submit", "demo.yaml", "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"version", "run", "path", "place", "target", "id", "folder", "more", "validation"}
    assert (found["run"], found["target"], found["id"]) == ("demo", "slurm", "j1")
    assert found["validation"] == [{"what": "look", "state": "skipped", "text": "it is not here"}]


@pytest.mark.parametrize("state", ACTIVE)
def test_a_second_submit_while_the_job_is_to_run_is_refused_with_its_id_and_state(here, call, state):
    call("submit", "demo.yaml")
    said(state, "Priority")
    code, _, err = call("submit", "demo.yaml", "train.max_steps=9")
    assert code == 2
    assert f"slurm job j1 is {state} (Priority)" in err
    assert "launcher cancel" in err
    assert fake.called.count("submit") == 1
    assert not (here / "runs" / "demo" / "job" / "submission-2").exists()
    assert RunDirectory(here / "runs" / "demo").read_recipe()["train"]["max_steps"] == 6


@pytest.mark.parametrize("state", ["failed", "cancelled", "unknown"])
def test_a_job_that_is_over_or_forgotten_is_followed_by_the_next_with_its_changes_listed(here, call, state):
    call("submit", "demo.yaml")
    said(state)
    code, out, _ = call("submit", "demo", "train.max_steps=9")
    assert code == 0
    assert "changed train.max_steps: 6 -> 9" in out
    assert "slurm job j2" in out
    assert (here / "runs" / "demo" / "job" / "submission-2" / "job.txt").read_text() == "demo, number 2\n"


def test_what_the_target_refuses_leaves_nothing_behind(here, call):
    fake.refusal[:] = ["sbatch: error: Invalid partition name specified"]
    code, _, err = call("submit", "demo.yaml")
    assert (code, err) == (2, "sbatch: error: Invalid partition name specified\n")
    assert not (here / "runs").exists() or not any((here / "runs").iterdir())


def test_a_refused_submission_of_a_run_that_exists_leaves_the_run_and_its_last_job(here, call):
    call("submit", "demo.yaml")
    said("failed")
    fake.refusal[:] = ["no"]
    assert call("submit", "demo")[0] == 2
    assert sorted(path.name for path in (here / "runs" / "demo" / "job").iterdir() if path.is_dir()) == ["submission-1"]
    assert "slurm j1 failed" in call("status", "demo")[1]


def test_a_job_that_is_handed_over_but_cannot_be_written_down_is_named_and_its_run_stays(here, call, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launcher.jobs.submissions.append_line", full)
    code, _, err = call("submit", "demo.yaml")
    assert code == 2
    assert "slurm job j1 is submitted, but that could not be written down (No space left on device)" in err
    assert RunDirectory(here / "runs" / "demo").exists()


def test_all_that_validation_finds_bad_is_said_and_nothing_is_handed_over(here, call):
    fake.findings[:] = [
        Finding("sbatch --test-only", "bad", "Invalid account"), Finding("image", "bad", "missing"), Finding("x", "ok"),
    ]  # fmt: skip
    code, _, err = call("submit", "demo.yaml")
    assert code == 2
    assert err == "slurm would refuse the job:\n  sbatch --test-only: Invalid account\n  image: missing\n"
    assert "submit" not in fake.called


def test_what_a_target_cannot_do_is_said_with_all_else_that_is_wrong_and_its_line(here, call):
    fake.faults[:] = [Problem("cluster.target", "slurm", "a cluster with GPUs", "Ask for them.")]
    for verb in (("check",), ("render",), ("submit",)):
        code, _, err = call(*verb, "demo.yaml", "train.micro_batch_size=0")
        assert code == 2
        assert "2 problems" in err
        assert "train.micro_batch_size = 0" in err
        assert "line 6: cluster.target = slurm: expected a cluster with GPUs. Ask for them." in err
    assert call("check", "demo.yaml", "--target", "torchrun")[0] == 0  # of which it is not true
    assert not (here / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "render", "submit"])
def test_an_unknown_target_names_those_that_exist(here, call, verb):
    code, _, err = call(verb, "demo.yaml", "--target", "slrum")
    assert code == 2
    assert "--target slrum: expected one of torchrun, accelerate, slurm, ray, kubernetes. Did you mean 'slurm'?" in err


def test_target_option_wins_over_the_recipe_and_is_part_of_what_is_kept(here, call):
    assert json.loads(call("render", "demo.yaml", "--target", "torchrun", "--json")[1])["target"] == "torchrun"
    assert call("submit", "demo.yaml", "--target", "ray")[0] == 0
    assert RunDirectory(here / "runs" / "demo").read_recipe()["cluster"]["target"] == "ray"


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_what_is_neither_recipe_nor_run_is_said_so(here, call, verb):
    code, _, err = call(verb, "nothing-here")
    assert code == 2
    assert "'nothing-here' is neither a recipe nor a run" in err
    code, _, err = call(verb, "dem.yaml")
    assert code == 2
    assert "demo.yaml" in err


def test_another_run_under_the_same_name_needs_force(here, call):
    call("submit", "demo.yaml")
    said("failed")
    code, _, err = call("submit", "demo.yaml", "train.seed=7")
    assert code == 2
    assert "train.seed" in err
    assert call("submit", "demo.yaml", "train.seed=7", "--force")[0] == 0


def test_a_run_that_somebody_drives_is_not_submitted(here, call):
    call("submit", "demo.yaml")
    said("failed")
    run = RunDirectory(here / "runs" / "demo")
    hold = "from launcher.run.lease import hold_lease\nwith hold_lease(run): say('held'); hear()"
    with Script(run, hold) as script:
        assert script.heard() == "held"
        code, _, err = call("submit", "demo")
    assert code == 2
    assert "is being trained already" in err
    assert fake.called.count("submit") == 1


def test_two_submits_at_once_do_not_both_find_nothing_queued(here, call):
    with one_at_a_time(here / "runs" / "demo"):
        code, _, err = call("submit", "demo.yaml")
    assert code == 2
    assert "another `launcher submit` of this run is at work" in err


def test_a_run_directory_that_cannot_be_written_is_said(here, call):
    code, _, err = call("submit", "demo.yaml", "run.dir=/proc/nowhere")
    assert code == 2
    assert "/proc/nowhere" in err


@pytest.mark.parametrize(
    ("state", "end", "code"),
    [
        ("finished", "finished", 0), ("failed", "user", 2), ("failed", "hang", 1), ("failed", None, 1),
        ("cancelled", "preemption", 75), ("cancelled", "cancelled", 1),
    ],
)  # fmt: skip
def test_wait_says_each_state_once_and_ends_as_the_run_does(here, call, monkeypatch, state, end, code):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    waiting = JobStatus("queued", "Resources")
    fake.answers[:] = [waiting, waiting, JobStatus("running", "", "n1"), JobStatus(state, "over")]
    run = RunDirectory(here / "runs" / "demo")
    if end:
        call("submit", "demo.yaml", "--target", "ray")  # makes the run
        attempt(run, ended=end, job_id="j2")
        fake.answers[:0] = [JobStatus("failed")]
    got, out, _ = call("submit", "demo.yaml", "--wait")
    assert got == code
    assert out.count("queued: Resources") == 1
    assert "running on n1" in out
    assert f"{state}: over" in out


def test_a_finished_run_is_not_submitted_again_and_that_is_no_mistake(here, call, monkeypatch):
    monkeypatch.setattr("launcher.jobs.submit.agrees", lambda run, recipe: True)
    monkeypatch.setattr("launcher.jobs.submit.reached_end", lambda run: True)
    code, out, _ = call("submit", "demo.yaml")
    assert code == 0
    assert "is finished; a larger train.max_steps" in out
    assert fake.called == []


def test_a_sweep_on_ray_is_a_job_for_each_run_as_render_shows_them(here, call):
    sweep = ("demo.yaml", "--target", "ray", "cluster.ray.address=http://head:8265", "--sweep", "train.seed=1,2")
    shown = json.loads(call("render", *sweep, "--json")[1])["jobs"]
    assert [(job["folder"], job["files"]["job.txt"]) for job in shown] == [
        (name, f"{name}, number 1\n") for name in ("demo-seed-1", "demo-seed-2")
    ]
    code, out, _ = call("submit", *sweep)
    assert code == 0
    kept = here / "state" / "launcher" / "runs"
    assert out.splitlines() == [
        *(f"submitted {here}/runs/demo-seed-{seed}: ray job j1" for seed in (1, 2)),
        *(f"  files:  {kept}/demo-seed-{seed}/job/submission-1" for seed in (1, 2)),
        "  look:   launcher runs",
        "  stop:   launcher cancel demo-seed-1, and so each of the others",
    ]
    for verb in ("status", "cancel"):
        code, _, err = call(verb, "demo")
        assert code == 2
        assert err.startswith(
            "no run 'demo', but 2 whose name begins so, as those of a sweep: demo-seed-1, demo-seed-2."
        )
    for job in shown:
        folder = kept / job["folder"] / "job" / "submission-1"
        assert {name: (folder / name).read_text() for name in job["files"]} == job["files"]


def test_cancel_ends_a_queued_job_and_leaves_the_word_for_one_that_starts(here, call):
    call("submit", "demo.yaml")
    said("queued", "Priority")
    code, out, _ = call("cancel", "demo")
    assert code == 0
    assert "slurm job j1, queued: asked to end" in out
    assert "cancel j1" in fake.called
    assert stop_reason(RunDirectory(here / "runs" / "demo")).startswith("cancel by ")


def test_cancel_of_what_is_over_or_was_never_started_exits_2(here, call):
    call("submit", "demo.yaml")
    said("finished")
    code, _, err = call("cancel", "demo")
    assert code == 2
    assert "slurm job j1 is finished" in err
    assert "nothing to cancel" in err
    assert "cancel j1" not in fake.called
    assert stop_reason(RunDirectory(here / "runs" / "demo")) is None
    code, _, err = call("cancel", "dem")
    assert code == 2
    assert "Did you mean 'demo'?" in err


def test_cancel_stops_a_run_that_a_terminal_drives(here, call):
    call("submit", "demo.yaml")
    said("failed")
    run = RunDirectory(here / "runs" / "demo")
    hold = "from launcher.run.lease import hold_lease\nwith hold_lease(run): say('held'); hear()"
    with Script(run, hold) as script:
        assert script.heard() == "held"
        code, out, _ = call("cancel", "demo")
        assert code == 0
        assert f"asked for a checkpoint and the end (host {script_host()}, pid {script.pid})" in out
    assert stop_reason(run).startswith("cancel by ")
    assert "cancel j1" not in fake.called


def script_host() -> str:
    import socket

    return socket.gethostname()


def test_status_shows_the_scheduler_beside_the_run(here, call):
    call("submit", "demo.yaml")
    said("queued", "Resources")
    out = call("status", "demo")[1]
    assert re.search(r"^job +slurm j1 queued \(Resources\), submitted 20", out, re.M)
    found = json.loads(call("status", "demo", "--json")[1])
    assert (found["status"], found["job"]["state"], found["job"]["reason"]) == ("queued", "queued", "Resources")
    assert set(found["job"]) == {
        "target", "id", "state", "reason", "nodes", "submission", "folder", "time", "host",
    }  # fmt: skip


def test_history_answers_why_it_restarted_seven_times(here, call):
    call("submit", "demo.yaml")
    said("running")
    run = RunDirectory(here / "runs" / "demo")
    for step in range(6):
        attempt(run, step=step, ended="preemption", verdict="requeue", why="preempted by a job of higher priority")
    attempt(run)  # killed without a word
    number = attempt(run)
    write_state(run, "running", attempt=number, step=7)
    heading, *lines = call("status", "demo", "--history")[1].splitlines()
    assert heading.split() == [
        "attempt", "started", "reason", "job", "restart", "nodes", "steps", "lasted", "ended", "verdict", "why",
    ]  # fmt: skip
    assert len(lines) == 8
    assert "slurm j1" in lines[0]
    assert lines[2].endswith("preemption  requeue  preempted by a job of higher priority")
    assert "no word" in lines[6]
    assert all("submitted" in line for line in lines)
    assert "n1,n2" in lines[0]


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_run_whose_job_ended_before_its_first_attempt_does_not_wait_for_ever(here, call, state):
    call("submit", "demo.yaml")
    said("queued", "Priority")
    assert "state       queued" in call("status", "demo")[1]
    said(state, "ended before its first attempt")
    assert f"state       {state}" in call("status", "demo")[1]
    assert state in call("runs")[1].splitlines()[1].split()[1]


@pytest.mark.parametrize("why", ["user: another start would end the same way", "another start would end the same way"])
def test_the_class_of_an_end_is_said_once(here, call, why):
    call("submit", "demo.yaml")
    attempt(RunDirectory(here / "runs" / "demo"), ended="user", verdict="stop", why=why)
    assert "failed (user: another start would end the same way)" in call("status", "demo")[1]


@pytest.mark.parametrize("options", [[], ["--history"]])
def test_a_stopped_run_whose_job_is_over_is_said_to_be_left_to_a_person(here, call, options):
    call("submit", "demo.yaml")
    run = RunDirectory(here / "runs" / "demo")
    number = attempt(run, step=3, ended="preemption", verdict="requeue", why="preemption: stopped")
    write_state(run, "preempted", attempt=number, step=3)
    said("cancelled", "CANCELLED by 0")
    shown = call("status", "demo", *options)[1]
    assert "its slurm job j1 is over (cancelled): nothing starts it again; `launcher submit" in shown
    said("queued", "BeginTime")
    assert "nothing starts it again" not in call("status", "demo", *options)[1]


def test_a_scheduler_with_much_to_say_gets_no_more_than_its_cell_in_runs(here, call):
    call("submit", "demo.yaml")
    said("unknown", "squeue: error: " * 50)
    row = call("runs")[1].splitlines()[1]
    assert row.endswith("...")
    assert len(row) < 200
    assert "squeue: error: " * 50 in call("status", "demo")[1]


def test_history_of_a_run_that_waits_says_so(here, call):
    call("submit", "demo.yaml")
    said("queued", "Priority")
    assert call("status", "demo", "--history")[1] == "demo: no attempt yet; slurm j1 queued (Priority)\n"


def test_runs_asks_a_scheduler_once_and_never_about_jobs_whose_end_the_ledger_has(here, call):
    for name in ("a", "b", "c"):
        call("submit", "demo.yaml", f"run.name={name}")
    attempt(RunDirectory(here / "runs" / "c"), ended="finished")
    fake.called.clear()
    said("queued", "Priority")
    out = call("runs")[1]
    assert fake.called == ["status j1 j1"]
    assert out.count("slurm j1 queued (Priority)") == 2
    assert "slurm j1 finished" in out
    fake.called.clear()
    assert call("runs", "--no-ask")[1].count("unknown (not asked)") == 2
    assert fake.called == []


def test_a_scheduler_that_cannot_be_asked_is_unknown_with_the_reason(here, call):
    call("submit", "demo.yaml")
    assert "slurm j1 unknown (RuntimeError: the controller is away)" in call("runs")[1]
    assert "the controller is away" in call("status", "demo")[1]


def test_a_run_that_only_pods_see_is_found_by_its_name(here, call):
    keys = [
        "--target", "kubernetes", "run.dir=/shared/runs", "cluster.kubernetes.image=i", "cluster.kubernetes.claim=c",
        "data.train.0.path=/shared/data.jsonl", "data.cache_dir=/shared/cache", "model.tokenizer=/shared/tokenizer",
    ]  # fmt: skip
    code, out, err = call("submit", "demo.yaml", *keys)
    assert (code, err) == (0, "")
    assert not (here / "runs").exists()
    assert (here / "state" / "launcher" / "runs" / "demo" / "job" / "submission-1" / "job.txt").exists()
    assert "launcher status demo\n" in out
    said("running", "", "pod-0")
    found = json.loads(call("status", "demo", "--json")[1])
    assert (found["path"], found["status"], found["job"]["nodes"]) == ("/shared/runs/demo", "running", "pod-0")
    assert call("status", "/shared/runs/demo")[0] == 0
    assert "kubernetes j1 running" in call("runs")[1]
    assert call("logs", "demo", "--job", "--lines", "2")[1] == "j1 line 3\nj1 line 4\n"
    assert call("cancel", "demo")[0] == 0
    assert "cancel j1" in fake.called
    said("cancelled")
    code, out, _ = call("submit", "demo", "train.max_steps=8")
    assert code == 0
    assert "kubernetes job j2" in out


def test_logs_of_a_job_that_was_not_submitted_or_of_a_rank_at_once_exit_2(here, call):
    call("submit", "demo.yaml")
    assert call("logs", "demo", "--job")[1].splitlines() == [f"j1 line {i}" for i in range(5)]
    code, _, err = call("logs", "demo", "--job", "--rank", "1")
    assert code == 2
    assert "--job prints a job's own output" in err
    from tests.run.make import make_run

    make_run(here / "runs", "alone")
    code, _, err = call("logs", "alone", "--job")
    assert code == 2
    assert "nothing was submitted" in err


def test_render_shows_environment_and_validation_and_ends_with_2_where_the_job_would_be_refused(here, call):
    keys = ["cluster.env=[HF_TOKEN]"]
    code, out, _ = call("render", "demo.yaml", *keys)
    assert code == 0
    for part in ("==> recipe.yaml <==", "==> plan.json <==", "==> job.txt <==", "==> environment <==\nHF_TOKEN  ("):
        assert part in out
    fake.findings[:] = [Finding("sbatch --test-only", "bad", "Invalid account")]
    code, out, _ = call("render", "demo.yaml")
    assert code == 2
    assert "==> validation <==\nbad      sbatch --test-only: Invalid account\n" in out
    found = json.loads(call("render", "demo.yaml", *keys, "--json")[1])
    assert found["environment"] == {"set": {}, "taken": ["HF_TOKEN"]}
    assert found["validation"][0]["state"] == "bad"
    assert not (here / "runs").exists()


def test_render_into_a_folder_names_what_an_earlier_one_left_there(here, call):
    sweep = ("render", "demo.yaml", "--target", "ray", "cluster.ray.address=http://head:8265", "-o", "job", "--sweep")
    assert call("render", "demo.yaml", "-o", "job")[2] == ""
    (here / "job" / "node-1.sh").write_text("the other node\n")
    code, out, err = call("render", "demo.yaml", "-o", "job")
    assert (code, err) == (0, "job has files from before that are no part of this job: node-1.sh\n")
    assert "node-1.sh" not in out
    assert (here / "job" / "node-1.sh").exists()
    assert "job.txt, node-1.sh" in call(*sweep, "train.seed=1,2")[2]
    assert "demo-seed-2" in call(*sweep, "train.seed=1")[2]
    assert json.loads(call("render", "demo.yaml", "-o", "job", "--json")[1])


def test_diff_shows_what_a_submission_would_change_and_nothing_else(here, call):
    call("submit", "demo.yaml")
    folder = here / "runs" / "demo" / "job" / "submission-1"
    assert call("render", "demo.yaml", "--diff", "demo")[1] == f"the same as demo has started last ({folder})\n"
    assert call("render", "demo", "--diff", "demo")[1].startswith("the same")
    out = call("render", "demo.yaml", "train.max_steps=9", "--diff", "demo")[1]
    assert out.startswith("--- last/recipe.yaml\n+++ now/recipe.yaml\n@@")
    assert re.search(r'^-    "max_steps": 6,?\n\+    "max_steps": 9,?$', out, re.M)
    assert "job.txt" not in out
    out = call("render", "demo.yaml", "--target", "torchrun", "--diff", "demo")[1]
    assert "--- last/job.txt\n+++ /dev/null\n" in out
    assert "--- /dev/null\n+++ now/job.sh\n" in out
    found = json.loads(call("render", "demo.yaml", "train.max_steps=9", "--diff", "demo", "--json")[1])
    assert set(found) == {"against", "diff"}
    assert set(found["diff"]) == {"recipe.yaml", "plan.json"}


def test_diff_of_a_run_that_was_started_here_is_against_its_last_attempt(here, call):
    call("render", "demo.yaml", "--target", "torchrun", "-o", "rendered")
    call("submit", "demo.yaml")
    run = RunDirectory(here / "runs" / "demo")
    (run.path / "job" / "submissions.jsonl").unlink()
    code, _, err = call("render", "demo.yaml", "--diff", "demo")
    assert code == 2
    assert "--diff demo: it has started no job yet" in err
    (here / "rendered").rename(folder := run.job(attempt(run)))
    (folder / "provenance.json").write_text("{}")
    again = ["render", "demo.yaml", "--target", "torchrun", "--diff", "demo"]
    assert call(*again)[1].startswith("the same as demo")
    (folder / "job.sh").unlink()  # as beside an attempt that a target started
    assert call(*again)[1].startswith("the same as demo")
    assert call(*again, "train.max_steps=9")[1].count("+++ now/") == 2


@pytest.mark.parametrize("more", [["-o", "job"], ["--explain"]])
def test_diff_goes_with_nothing_else_that_prints(here, call, more):
    call("submit", "demo.yaml")
    code, _, err = call("render", "demo.yaml", "--diff", "demo", *more)
    assert code == 2
    assert "--diff prints differences and nothing else" in err


def test_a_run_that_was_moved_still_has_its_submissions(here, call):
    call("submit", "demo.yaml")
    Path("runs/demo").rename("runs/moved")
    assert call("render", "moved", "--diff", "moved")[0] == 0
    said("queued")
    assert "slurm j1 queued" in call("status", "moved")[1]
