"""Every `launcher` command of the README runs, in the README's order, on the inputs that the demo builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import VERBS
from launcher.jobs.job import OVER
from launcher.jobs.submissions import latest
from launcher.jobs.targets.process import status
from tests.jobs.make import until

README = (Path(__file__).parent.parent / "README.md").read_text()


def commands() -> list[list[str]]:
    """Arguments of each `launcher ...` line inside the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("launcher ")]


def test_the_table_of_verbs_names_each_verb_once():
    table = README.split("## Verbs")[1].split("## ")[0]
    assert sorted(set(re.findall(r"`([a-z-]+)[ `]", table)) & set(VERBS)) == sorted(VERBS)


def test_the_commands_of_the_readme_cover_every_verb_but_the_schedulers_own():
    assert {arguments[0] for arguments in commands()} == set(VERBS) - {"worker"}


def test_the_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


@pytest.mark.gloo
@pytest.mark.timeout(1200)
def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launcher.demo.__main__ import _build_inputs

    monkeypatch.chdir(tmp_path)
    _build_inputs()
    try:
        for arguments in commands():
            result = subprocess.run(
                [sys.executable, "-m", "launcher", *arguments],
                cwd=tmp_path / "demo",
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert result.returncode == 0, f"{arguments}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
            assert result.stdout.strip(), f"{arguments} printed nothing"
    finally:
        jobs = [job for run in (tmp_path / "demo" / "runs").glob("*") if (job := latest(run)) is not None]
        until("the job in the background to end", lambda: all(status(job).state in OVER for job in jobs))
    assert [status(job).state for job in jobs] == ["cancelled"]
    assert (tmp_path / "demo" / "runs" / "short" / "final" / "model.safetensors").exists()


def test_the_data_section_is_one_that_check_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launcher.recipe.check import load

    monkeypatch.chdir(tmp_path)
    for name in ("data/chat.jsonl", "heldout/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "data" / "dataset_info.json").write_text('{"identity": {"file_name": "chat.jsonl"}}')
    section = README.split("## Data\n")[1].split("```yaml\n")[1].split("```")[0]
    head = "model: {name: org/model}\ntrain: {global_batch_size: 8, epochs: 1}\n"
    (tmp_path / "recipe.yaml").write_text(head + section)
    assert len(load("recipe.yaml").recipe.data.train) == 2
