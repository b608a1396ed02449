"""`runs`, `status` and `logs`: what they print, and exit code 2 for what is not there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from launcher.cli import logs, main
from launcher.run.control import Outcome, write_outcome
from launcher.run.lease import hold_lease
from launcher.run.ledger import end_attempt
from launcher.run.state import write_state
from tests.run.make import commit, make_run, start


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(here, capsysbinary):
    """Call the command line; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capsysbinary.readouterr()
        return left.value.code, out.decode(), err.decode()

    return run


def failed_run(folder, name="demo"):
    run = make_run(folder, name)
    commit(run, step=40, attempt=start(run, "first start"))
    end_attempt(run, 1, step=44, outcome_class="preemption")
    start(run, "after preemption")
    for rank in (0, 1):
        path = run.log_file(2, "n1", rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"rank {rank} line {i}\n" for i in range(100)))
    outcome = Outcome("failed", "data", 60, "rank 1, step 60: bad row", "Traceback\n  DataError: bad", "n1")
    write_outcome(run, 2, 1, outcome)
    write_state(run, "failed", attempt=2, step=60, total_steps=400)
    end_attempt(run, 2, step=60, outcome_class="data")
    return run


def test_status_shows_state_attempts_checkpoint_and_the_first_failing_rank(here, call):
    failed_run(here / "runs")
    code, out, _ = call("status", "demo")
    assert code == 0
    for part in (
        "failed, step 60/400", "step-00000040-a1", "first start", "after preemption", "preemption", "data",
        "first failure: rank 1 on n1 at step 60: data: rank 1, step 60: bad row", "  DataError: bad",
    ):  # fmt: skip
        assert part in out


def test_status_as_json_is_the_documented_shape_and_the_same_by_name_and_by_path(here, call):
    failed_run(here / "runs")
    by_name, by_path = call("status", "demo", "--json")[1], call("status", "runs/demo/", "--json")[1]
    assert by_name == by_path
    summary = json.loads(by_name)
    assert (summary["version"], summary["status"], summary["step"], summary["failure"]["rank"]) == (1, "failed", 60, 1)
    assert set(summary["attempts"][0]) == {
        "number", "target", "job_id", "nodes", "reason", "accepts", "time", "host", "pid", "launcher_version", "end",
        "last_step", "restart", "within", "first_step",
    }  # fmt: skip


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_missing_run_exits_2_and_shows_the_nearest_name(here, call, verb):
    make_run(here / "runs", "quickstart")
    code, out, err = call(verb, "quikstart")
    assert (code, out) == (2, "")
    assert "no run 'quikstart'" in err
    assert "Did you mean 'quickstart'?" in err


def test_folder_that_is_no_run_exits_2(here, call):
    (here / "x").mkdir()
    assert call("status", "x")[::2] == (2, "x is no run: it holds no run.json.\n")
    assert call("status", "faraway")[0] == 2


def test_interrupted_run_says_how_to_go_on(here, call):
    start(make_run(here / "runs"))
    out = call("status", "demo")[1]
    assert "interrupted" in out
    assert f"launcher resume {here / 'runs' / 'demo'}" in out


def test_live_run_names_its_owner(here, call):
    run = make_run(here / "runs")
    with hold_lease(run) as lease:
        write_state(run, "running", attempt=start(run), step=3)
        assert f"on {lease.owner.host}, pid {lease.owner.pid}" in call("status", "demo")[1]


def test_runs_lists_one_line_a_run(here, call):
    failed_run(here / "runs", "one")
    make_run(here / "runs", "two")
    code, out, _ = call("runs")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["run", "state", "step", "loss", "attempt", "changed", "job"]
    assert sorted(line.split()[:3] for line in lines) == [["one", "failed", "60/400"], ["two", "queued", "?/?"]]


def test_runs_as_json_holds_the_shape_of_status(here, call):
    failed_run(here / "elsewhere", "one")
    listed = json.loads(call("runs", "elsewhere", "--json")[1])
    assert set(listed) == {"version", "dir", "runs"}
    assert listed["runs"] == [json.loads(call("status", "elsewhere/one", "--json")[1])]


def test_no_runs_is_no_error_but_a_named_folder_must_be_there(here, call):
    assert call("runs")[:2] == (0, "no runs in runs/\n")
    assert json.loads(call("runs", "--json")[1])["runs"] == []
    assert call("runs", "missing")[0] == 2


def test_logs_prints_rank_0_of_the_latest_attempt(here, call):
    run = failed_run(here / "runs")
    assert call("logs", "demo")[1] == run.log_file(2, "n1", 0).read_text()


def test_logs_prints_the_end_of_another_rank(here, call):
    failed_run(here / "runs")
    assert call("logs", "demo", "--rank", "1", "--lines", "2")[1] == "rank 1 line 98\nrank 1 line 99\n"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a", b"a\n", b"a\nbb", b"a\nbb\n", b"\n\n\n", b"abc\n\ndef\nghijkl\n\n"]
)
def test_last_lines_are_found_whatever_the_block_they_lie_in(tmp_path, monkeypatch, content):
    (tmp_path / "log").write_bytes(content)
    for block in range(1, 8):
        monkeypatch.setattr(logs, "_BLOCK", block)
        for lines in range(6):
            with open(tmp_path / "log", "rb") as log:
                logs._seek_last_lines(log, lines)
                assert log.read() == b"".join(content.splitlines(keepends=True)[-lines:] if lines else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "7"], "no log of rank 7 in attempt 2. Logs there (node/rank): n1/0, n1/1."),
        (["--attempt", "9"], "--attempt 9: expected 1 to 2"),
        (["--attempt", "1"], "Logs there (node/rank): none."),
        (["--node", "n9"], "no log of rank 0 on node n9"),
    ],
)
def test_log_that_is_not_there_exits_2_and_says_which_are(here, call, arguments, message):
    failed_run(here / "runs")
    code, out, err = call("logs", "demo", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_logs_of_a_run_that_never_started_exits_2(here, call):
    make_run(here / "runs")
    code, _, err = call("logs", "demo")
    assert (code, "no attempt has started" in err) == (2, True)


def test_rank_with_logs_on_two_nodes_asks_for_the_node(here, call):
    run = failed_run(here / "runs")
    other = run.log_file(2, "n2", 0)
    other.parent.mkdir()
    other.write_text("other\n")
    code, _, err = call("logs", "demo")
    assert (code, "on several nodes: n1, n2. Choose by --node" in err) == (2, True)
    assert call("logs", "demo", "--node", "n2")[1] == "other\n"


def follow(here, *arguments):
    command = [sys.executable, "-m", "launcher", "logs", "demo", "--follow", *arguments]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def append(run, text):
    path = run.log_file(1, "n1", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(text)


def test_follow_waits_for_the_log_passes_on_what_comes_and_ends_with_the_attempt(here):
    run = make_run(here / "runs")
    with hold_lease(run):
        start(run)
        with follow(here) as process:
            append(run, "one\n")
            assert process.stdout.readline() == "one\n"
            append(run, "two\n")
            assert process.stdout.readline() == "two\n"
            append(run, "last, without an end of line")
            end_attempt(run, 1, step=1, outcome_class=None)
            assert process.communicate(timeout=60) == ("last, without an end of line", "")
            assert process.returncode == 0


def test_follow_ends_when_the_launcher_is_gone(here):
    run = make_run(here / "runs")
    append(run, "one\n")
    start(run)
    with follow(here) as process:
        assert process.communicate(timeout=60) == ("one\n", "")


def test_ctrl_c_ends_follow_quietly(here):
    run = make_run(here / "runs")
    append(run, "one\n")
    with hold_lease(run):
        start(run)
        with follow(here, "--lines", "1") as process:
            assert process.stdout.readline() == "one\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")


def test_these_verbs_import_nothing_heavy(here):
    failed_run(here / "runs")
    for arguments in (["runs"], ["status", "demo"], ["logs", "demo"]):
        code = (
            f"import sys\nfrom launcher.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "launcher.run.ledger" in done.stderr.split()
        assert not set(done.stderr.split()) & {"torch", "numpy", "omegaconf", "yaml", "rich", "transformers"}
