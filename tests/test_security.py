"""Files from others run no code; secrets stay out of logs and process lists; a run directory writes in itself alone."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory
from launcher.run.lease import hold_lease
from launcher.run.secrets import MASK, masked_by
from tests.jobs.make import MODEL, project


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def launcher(*words: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir [{path}]",
        "run: {{name: !!python/object/new:os.mkdir [{path}]}}",
        "run: {{name: '${{oc.create:os.mkdir}}'}}",
        "run: {{name: '${{oc.env:HOME}}'}}",
        'run: {{name: \'${{python:__import__("os").mkdir("{path}")}}\'}}',
    ],
)
def test_a_recipe_runs_nothing_and_reads_no_environment(text, tmp_path):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(text.format(path=tmp_path / "PWNED") + "\n")
    done = launcher("check", str(recipe))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert os.environ.get("HOME", "?") + "\n" not in done.stdout
    assert not (tmp_path / "PWNED").exists()


def test_a_symbolic_link_in_a_run_directory_is_refused_by_name(tmp_path):
    run, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    run.path.mkdir()
    (run.path / "control").symlink_to(elsewhere)
    with pytest.raises(Exception, match=r"control -> .*elsewhere"), hold_lease(run):
        pytest.fail("the lease was written through a link")
    (run.path / "control").unlink()
    run.control.mkdir()
    (run.control / "lease").symlink_to(elsewhere / "lease")
    (run.path / "metrics.jsonl").symlink_to(elsewhere / "metrics")
    with pytest.raises(Exception, match=r"(?s)metrics.jsonl -> .*lease -> "), hold_lease(run):
        pytest.fail("the lease was written through a link")
    assert list(elsewhere.iterdir()) == []


def test_a_run_directory_that_is_itself_reached_through_a_link_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with hold_lease(RunDirectory(tmp_path / "runs" / "one")):
        assert (tmp_path / "disk" / "one" / "control" / "lease").exists()


def test_masked_are_the_values_of_the_named_variables_longest_first(monkeypatch):
    monkeypatch.setenv("TOKEN", "hf_abcdef")
    monkeypatch.setenv("LONGER", "hf_abcdef_and_more")
    monkeypatch.setenv("KEY", "first line\nsecond line\n")
    monkeypatch.setenv("DEBUG", "1")
    mask = masked_by(["TOKEN", "LONGER", "KEY", "DEBUG", "MISSING"])
    assert mask("a hf_abcdef b hf_abcdef_and_more c 1") == f"a {MASK} b {MASK} c 1"
    assert mask("first line\nsecond line") == f"{MASK}\n{MASK}"


def evil_model(folder: Path, harm: Path) -> Path:
    """A model folder whose weights are a pickle that makes `harm`, and which names Python code of its own."""
    from transformers import LlamaConfig

    LlamaConfig(**MODEL).save_pretrained(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.embed_tokens.weight": Evil(harm)}, file)
    return folder


@pytest.mark.gloo
@pytest.mark.slow
def test_a_pickle_among_the_weights_is_refused_and_a_secret_in_the_message_is_masked_everywhere(tmp_path):
    """The folder's name holds the secret, as an address with a token would, and the refusal quotes it."""
    folder = evil_model(tmp_path / "hub-s3cret-model", tmp_path / "PWNED")
    tokenizer = str(tmp_path / "tokenizer")
    model = {"name": str(folder), "config": None, "tokenizer": tokenizer}
    recipe = project(tmp_path, cluster={"env": ["HUB_TOKEN"], "nproc_per_node": 1}, model=model)
    done = launcher("run", str(recipe), HUB_TOKEN="hub-s3cret")
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert f"{MASK}-model: the weights cannot be read" in said
    assert "hub-s3cret" not in said
    assert not (tmp_path / "PWNED").exists()
    run = tmp_path / "runs" / "tiny"
    logs = [path for path in run.rglob("*") if path.suffix in (".log", ".jsonl") or path.parent.name == "outcome"]
    assert all("hub-s3cret" not in path.read_text() for path in logs if path.is_file())


@pytest.mark.gloo
@pytest.mark.slow
def test_code_that_comes_with_a_model_is_not_run_unless_the_recipe_says_so(tmp_path):
    """`auto_map` in the config names a class in a file of the folder; importing the file would make a folder."""
    folder = evil_model(tmp_path / "model", tmp_path / "PWNED")
    (folder / "pytorch_model.bin").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'PWNED')!r})\n")
    model = {"name": str(folder), "config": None, "tokenizer": str(tmp_path / "tokenizer")}
    recipe = project(tmp_path, cluster={"nproc_per_node": 1}, model=model)
    done = launcher("run", str(recipe))
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert "model.trust_remote_code" in said
    assert not (tmp_path / "PWNED").exists()
