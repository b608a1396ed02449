"""`cluster.snapshot`: a job runs from the code as it was when it was handed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher as package
from launcher.errors import UserError
from launcher.jobs import snapshot
from launcher.jobs.spec import JobSpec
from launcher.jobs.targets import render
from launcher.recipe.schema import Cluster
from launcher.run.provenance import record
from tests.jobs.make import finish, launcher, project, run_of, until


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    (folder / "scripts").mkdir(parents=True)
    for name, text in {
        "mine.py": "VALUE = 'old'", ".gitignore": "ignored.py", "ignored.py": "", "new.py": "", "api.token": "secret",
        "secrets.py": "tracked code", "scripts/go.sh": "echo go",
    }.items():  # fmt: skip
        (folder / name).write_text(f"{text}\n")
    (folder / "scripts" / "go.sh").chmod(0o755)
    (folder / "link.py").symlink_to("mine.py")
    git(folder, "init", "-q")
    git(folder, "add", "mine.py", ".gitignore", "secrets.py", "scripts", "link.py")
    git(folder, "commit", "-q", "-m", "first")
    monkeypatch.chdir(folder)
    return folder


def spec(folder: Path, **more) -> JobSpec:
    cluster = Cluster(snapshot=True)
    run = str(folder / "runs" / "r")
    return JobSpec(name="r", run=run, cluster=cluster, **more)


def copied(repository: Path) -> tuple[JobSpec, Path]:
    planned = snapshot.planned(spec(repository))
    snapshot.copy(planned)
    assert planned.code is not None
    return planned, Path(planned.code)


def python_in(job: JobSpec, statement: str) -> str:
    lines = [*job.code_lines, f'{sys.executable} -c "{statement}"']
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_job_runs_the_old_code_after_it_was_changed(repository):
    job, code = copied(repository)
    (repository / "mine.py").write_text("VALUE = 'new'\n")
    assert python_in(job, "import mine; print(mine.VALUE)") == "old"
    assert python_in(job, "import launcher; print(launcher.__file__)") == f"{code}/package/launcher/__init__.py"
    assert python_in(job, "from launcher.shipped import folder; print(folder('recipes'))").startswith(str(code))


def test_tracked_and_new_files_are_copied_but_neither_ignored_ones_nor_secrets_nor_runs(repository):
    (repository / "runs" / "r").mkdir(parents=True)
    (repository / "runs" / "r" / "big.bin").write_text("a checkpoint")
    (repository / "scripts" / "gone.sh").touch()
    git(repository, "add", "scripts")
    (repository / "scripts" / "gone.sh").unlink()
    _, code = copied(repository)
    tree = {str(path.relative_to(code / "repository")) for path in (code / "repository").rglob("*") if path.is_file()}
    assert tree == {".gitignore", "link.py", "mine.py", "new.py", "scripts/go.sh", "secrets.py"}
    assert (code / "repository" / "link.py").is_symlink()
    assert os.access(code / "repository" / "scripts" / "go.sh", os.X_OK)
    assert (code / "package" / "launcher" / "jobs" / "snapshot.py").exists()
    assert not list(code.rglob("__pycache__"))


def test_the_same_code_is_copied_once_and_other_code_beside_it(repository):
    _, first = copied(repository)
    before = (first / "repository" / "mine.py").stat().st_ino
    _, again = copied(repository)
    assert (again, (again / "repository" / "mine.py").stat().st_ino) == (first, before)
    (repository / "mine.py").write_text("VALUE = 'new'\n")
    _, other = copied(repository)
    assert other != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, other.name])


def test_a_change_between_planning_and_copying_is_refused_and_nothing_is_left(repository):
    planned = snapshot.planned(spec(repository))
    (repository / "mine.py").write_text("VALUE = 'new'\n")
    with pytest.raises(UserError, match="changed while it was copied"):
        snapshot.copy(planned)
    assert list((repository / "runs" / "r" / "job").iterdir()) == []


def test_too_much_code_names_the_largest_file(repository, monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT_MIB", 20)
    with open(repository / "weights.bin", "wb") as file:
        file.truncate(30 << 20)
    with pytest.raises(UserError, match=r"cluster\.snapshot = true: expected at most 20 MiB .*weights\.bin \(30 MiB\)"):
        snapshot.planned(spec(repository))


def test_outside_of_a_repository_the_launcher_alone_is_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    _, code = copied(tmp_path)
    assert (code / "package").is_dir()
    assert not (code / "repository").exists()


def test_the_attempts_provenance_is_that_of_the_copied_code(repository, tmp_path):
    (repository / "mine.py").write_text("VALUE = 'dirty'\n")
    _, code = copied(repository)
    git(repository, "commit", "-qam", "later")
    (tmp_path / "attempt").mkdir()
    record(tmp_path / "attempt", source=code / "repository")
    values = json.loads((tmp_path / "attempt" / "provenance.json").read_text())
    assert (values["recorded_in"], values["git"]["dirty"]) == (str(code), True)
    assert "+VALUE = 'dirty'" in (tmp_path / "attempt" / "dirty.patch").read_text()


@pytest.mark.parametrize("target", ["torchrun", "accelerate", "slurm"])
def test_the_script_makes_python_look_through_the_copy_first_and_says_where_it_is_missing(repository, target):
    job = snapshot.planned(spec(repository))
    (text,) = (text for name, text in render(job, target=target).files.items() if name.endswith((".sh", ".sbatch")))
    places = f"{job.code}/package:{job.code}/repository"
    assert f'export PYTHONSAFEPATH=1 PYTHONPATH={places}"${{PYTHONPATH:+:$PYTHONPATH}}"' in text
    done = subprocess.run(["bash", "-c", "\n".join(job.code_lines)], capture_output=True, text=True)
    assert (done.returncode, "only launcher submit copies the code" in done.stderr) == (2, True)


def test_without_the_key_nothing_is_planned(tmp_path):
    job = JobSpec(name="r")
    assert snapshot.planned(job) is job
    assert job.code_lines == ()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """A launcher of its own that may be broken."""
    folder = tmp_path / "live"
    shutil.copytree(Path(package.__file__).parent, folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(package.__file__).parents[1] / "recipes", folder / "recipes")
    return folder


@pytest.mark.gloo
@pytest.mark.parametrize("verb", ["run", "submit"])
def test_a_launcher_that_breaks_after_the_hand_over_does_not_break_the_run(tmp_path, live, verb):
    recipe = project(tmp_path / "project", cluster={"snapshot": True, "nproc_per_node": 1}, train={"max_steps": 3})
    run = run_of(recipe)
    arguments = [verb, recipe] if verb == "run" else [verb, recipe, "--target", "torchrun", "--wait"]
    process = launcher(*arguments, env={"PYTHONPATH": str(live)}, cwd=tmp_path)
    until("the copy", lambda: list((run.path / "job").glob("code-*")) or process.poll() is not None)
    (live / "launcher" / "trainer" / "main.py").write_text("raise RuntimeError('the live code')\n")
    finish(process, code=0)
    assert (run.path / "state.json").read_text().find('"finished"') > 0
