"""What an attempt records of where it came from: commit, uncommitted changes, versions, and no secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launcher.run import provenance
from launcher.run.provenance import PATCH, RECORD, is_secret, record, record_beside, recorded


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "inner").mkdir(parents=True)
    for name in ("code.py", "inner/more.py", ".env", "prod.env"):
        (folder / name).write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def recorded_in(folder: Path, source: Path) -> dict:
    folder.mkdir(exist_ok=True)
    record(folder, source=source)
    return json.loads((folder / RECORD).read_text())


def test_a_clean_repository_has_a_commit_and_no_patch(repository, tmp_path):
    values = recorded_in(tmp_path / "job", repository / "inner")
    assert values["git"]["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert (values["git"]["dirty"], values["git"]["patch"], values["git"]["untracked"]) == (False, None, [])
    assert not (tmp_path / "job" / PATCH).exists()
    assert values["packages"]["omegaconf"]
    assert values["launcher_version"]


def test_the_patch_leads_from_the_commit_to_what_lay_there(repository, tmp_path):
    (repository / "code.py").write_text("two\n")
    (repository / "inner" / "more.py").unlink()
    values = recorded_in(tmp_path / "job", repository / "inner")
    assert (values["git"]["dirty"], values["git"]["changed"]) == (True, 2)
    git(repository, "checkout", "-q", ".")
    git(repository, "apply", str(tmp_path / "job" / PATCH))
    assert (repository / "code.py").read_text() == "two\n"
    assert not (repository / "inner" / "more.py").exists()


def test_no_secret_is_written_and_that_is_said(repository, tmp_path):
    for name in (".env", "prod.env", "code.py"):
        (repository / name).write_text("the-secret-value\n" if name != "code.py" else "two\n")
    (repository / "api.token").write_text("the-secret-value\n")
    values = recorded_in(tmp_path / "job", repository)
    assert values["git"]["left_out"] == [".env", "prod.env"]
    assert values["git"]["untracked"] == ["api.token"]
    written = (tmp_path / "job" / RECORD).read_text() + (tmp_path / "job" / PATCH).read_text()
    assert "the-secret-value" not in written
    assert "+two" in written


def test_where_only_secrets_changed_there_is_no_patch(repository, tmp_path):
    (repository / ".env").write_text("the-secret-value\n")
    values = recorded_in(tmp_path / "job", repository)
    assert (values["git"]["dirty"], values["git"]["left_out"], values["git"]["patch"]) == (True, [".env"], None)


def test_an_attempt_in_the_folder_of_a_submission_repeats_what_was_recorded_when_it_was_submitted(repository, tmp_path):
    (repository / "code.py").write_text("two\n")
    submitted = recorded_in(tmp_path / "submission", repository)
    git(repository, "checkout", "-q", ".")
    attempt = recorded_in(tmp_path / "attempt", tmp_path / "submission")
    assert attempt["git"] == submitted["git"]
    assert attempt["recorded_in"] == str(tmp_path / "submission")
    assert (tmp_path / "attempt" / PATCH).read_text() == (tmp_path / "submission" / PATCH).read_text()


def test_a_long_patch_is_cut_and_that_is_said(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PATCH_BYTES", 1000)
    (repository / "code.py").write_text("".join(f"{i}\n" for i in range(10_000)))
    values = recorded_in(tmp_path / "job", repository)
    assert values["git"]["patch_cut"]
    patch = (tmp_path / "job" / PATCH).read_text()
    assert 1000 < len(patch) < 1100
    assert patch.endswith("# cut here, after 1000 bytes\n")


@pytest.mark.parametrize("what", ["no repository", "no commit", "no git"])
def test_without_a_commit_there_is_no_git_and_the_rest_is_recorded(tmp_path, monkeypatch, what):
    (tmp_path / "plain").mkdir()
    if what == "no commit":
        git(tmp_path / "plain", "init", "-q")
    if what == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    values = recorded_in(tmp_path / "job", tmp_path / "plain")
    assert values["git"] is None
    assert values["packages"]


def test_recording_beside_is_over_when_it_is_asked_for_and_a_folder_that_is_gone_troubles_nobody(repository, tmp_path):
    (tmp_path / "job").mkdir()
    record_beside(tmp_path / "job")
    record_beside(tmp_path / "nowhere")
    recorded()
    assert (tmp_path / "job" / RECORD).exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        (".env", True), (".env.local", True), ("a/b/.ENV", True), ("id_rsa", True), ("hf.token", True),
        ("key.pem", True), ("my_secret.txt", True), ("tokenizer.json", False), ("environment.py", False),
        ("keys.py", False), ("train.py", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name, secret):
    assert is_secret(name) is secret
