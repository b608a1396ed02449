"""The run directory's layout, identity and version."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launcher.errors import UserError
from launcher.run.directory import RunDirectory, checkpoint_name, parse_checkpoint_name
from launcher.run.provenance import git_state
from tests.run.make import make_run


def test_layout_is_the_documented_one(tmp_path):
    run = RunDirectory(tmp_path)
    paths = [
        run.recipe_file, run.plan_file, run.data_file, run.run_file, run.ledger_file, run.state_file, run.metrics_file,
        run.control, run.checkpoints, run.final, run.loss_png, run.job(2), run.log_file(2, "n1", 3),
        run.checkpoint(500, 3),
    ]  # fmt: skip
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "recipe.yaml", "plan.json", "data.json", "run.json", "ledger.jsonl", "state.json", "metrics.jsonl", "control",
        "checkpoints", "final", "loss.png", "job/attempt-2", "logs/attempt-2/n1/3.log", "checkpoints/step-00000500-a3",
    ]  # fmt: skip


def test_run_exists_once_created_and_gives_back_recipe_and_plan(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "x")
    assert not run.exists()
    run.create({"a": {"b": "# no comment"}, "c": None}, {"nodes": 2}, {"train.seed": 1})
    assert run.exists()
    assert run.read_recipe() == {"a": {"b": "# no comment"}, "c": None}
    assert run.read_json("plan.json") == {"nodes": 2}
    assert run.read_json("run.json")["identity"] == {"train.seed": 1}


def test_recipe_file_is_yaml_too(tmp_path):
    yaml = pytest.importorskip("yaml")
    run = make_run(tmp_path)
    assert yaml.safe_load(run.recipe_file.read_text()) == run.read_recipe()


def test_runs_have_ids_of_their_own_and_tell_versions(tmp_path):
    first, second = (make_run(tmp_path, name).read_json("run.json") for name in ("a", "b"))
    assert first["run_id"] != second["run_id"]
    assert int(first["run_id"], 16) >= 0
    assert first["run_directory_version"] == 1
    assert first["python_version"] == sys.version.split()[0]


def test_newer_run_directory_is_refused_with_the_reason(tmp_path):
    run = make_run(tmp_path)
    run.run_file.write_text(json.dumps({"run_directory_version": 2}))
    with pytest.raises(UserError, match="version 2: expected at most 1"):
        run.read_json("run.json")


def test_damaged_recipe_names_its_file_and_line(tmp_path):
    run = make_run(tmp_path)
    run.recipe_file.write_text("# head\n{\n  'a': 1\n}\n")
    with pytest.raises(UserError, match=r"recipe.yaml: not JSON .*line 3"):
        run.read_recipe()


def test_git_commit_and_dirty_flag_are_those_of_the_folder(tmp_path):
    assert git_state(tmp_path) is None

    def git(*arguments):
        quiet = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
        author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", tmp_path, *author, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | quiet)
        return done.stdout.strip()

    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_missing_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["step-1-a1", "step-00000001-a0", "step-00000001", ".step-00000001-a1", "step-00000001-a1.tmp"]
)
def test_other_names_are_no_checkpoints(name):
    assert parse_checkpoint_name(name) is None


def test_checkpoint_name_tells_step_and_attempt():
    for key in ((0, 1), (500, 3), (123456789, 12)):
        assert parse_checkpoint_name(checkpoint_name(*key)) == key


def test_run_package_is_standard_library_only():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import launcher.run.summary, launcher.run.lease, launcher.run.control\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["launcher"]
