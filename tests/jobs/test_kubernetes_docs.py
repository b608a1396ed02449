"""docs/kubernetes.md: its commands run, its recipe and manifests are valid, its Dockerfile's pip lines resolve."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.jobs.targets.kubernetes_validation import CRD_DIR, crd_complaints
from tests.jobs.api_server import ApiServer
from tests.jobs.test_kubernetes_client import api, launcher, parts

__all__ = ["api"]  # the fixture

PROJECT = Path(__file__).parent.parent.parent
PAGE = (PROJECT / "docs" / "kubernetes.md").read_text()


def block(first_line: str, *, language: str = "yaml") -> str:
    """The block of the page that begins with a line."""
    (found,) = re.findall(rf"```{language}\n({re.escape(first_line)}\n.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


def commands(mark: str) -> list[list[str]]:
    """Arguments of every `launcher` in the shell blocks below `<!-- mark -->`, in the page's order."""
    blocks = re.findall(rf"<!-- {re.escape(mark)} -->\n```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line)[1:] for text in blocks for line in text.splitlines()]


def test_every_shell_block_is_run_by_a_test():
    marked = len(re.findall(r"<!-- tested( with CRDs)? -->\n```sh\n", PAGE))
    assert PAGE.count("```sh\n") == marked > 3
    assert [words[0] for words in commands("tested")] == [
        "check", "render", "submit", "render", "render", "render", "status", "logs", "cancel",
    ]  # fmt: skip


def test_the_commands_of_the_page_run_on_its_recipe(api: ApiServer, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(block("# recipe.yaml"))
    for words in commands("tested"):
        code, said = launcher(capsys, *words)
        assert code == 0, f"{words}: {said}"
        if words[0] == "submit":
            job = api.objects["jobsets", "team-a", "llama-sft-1"]
            job["status"] = {"replicatedJobsStatus": parts(active=1, ready=1)}
            labels = {"jobset.sigs.k8s.io/jobset-name": "llama-sft-1"}
            api.put("pods", {"metadata": {"name": "llama-sft-1-node-0-0-abcde", "labels": labels}, "spec": {}})
            api.logs["llama-sft-1-node-0-0-abcde"] = "step 1\n"
        if words[0] == "status":
            assert "running" in said
        if words[0] == "logs":
            assert said == "step 1\n"
    assert ("jobsets", "team-a", "llama-sft-1") not in api.objects
    assert (tmp_path / "job" / "job.yaml").is_file()


@pytest.mark.skipif(CRD_DIR not in os.environ, reason=f"{CRD_DIR} names no folder with CRDs")
def test_the_recipe_is_valid_for_the_crds(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "crds").symlink_to(Path(os.environ[CRD_DIR]).absolute())
    monkeypatch.setenv(CRD_DIR, "nowhere")  # --crds comes before it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(block("# recipe.yaml"))
    for words in commands("tested with CRDs"):
        code, said = launcher(capsys, *words)
        assert (code, "ok       job (CRD)" in said) == (0, True), said


@pytest.mark.skipif(CRD_DIR not in os.environ, reason=f"{CRD_DIR} names no folder with CRDs")
def test_the_runtime_is_valid_for_its_crd():
    runtime = yaml.safe_load(block("# runtime.yaml"))
    file = Path(os.environ[CRD_DIR], "trainer.kubeflow.org_clustertrainingruntimes.yaml")
    assert list(crd_complaints(runtime, file)) == []


def test_the_runtime_has_the_rules_of_our_jobset():
    from tests.jobs.test_kubernetes import job_of, spec_of

    ours: dict[str, Any] = job_of(spec_of("jobset"))["spec"]
    theirs = yaml.safe_load(block("# runtime.yaml"))["spec"]["template"]["spec"]
    assert theirs["failurePolicy"] == ours["failurePolicy"]
    job, own = theirs["replicatedJobs"][0], ours["replicatedJobs"][0]
    assert job["name"] == own["name"]
    for key in ("backoffLimit", "podFailurePolicy"):
        assert job["template"]["spec"][key] == own["template"]["spec"][key]


def test_the_claim_is_one_for_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    claim = yaml.safe_load(block("# claim.yaml"))
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.slow
def test_the_pip_lines_of_the_dockerfile_resolve_against_this_checkout():
    """pip resolves them, extras and constraints included, against what is installed here; nothing is fetched."""
    text = re.search(r"```dockerfile\n(.*?)```", PAGE, flags=re.DOTALL)
    assert text is not None
    lines = re.findall(r"^RUN pip (install .*)$", text[1], flags=re.MULTILINE)
    assert len(lines) == 1
    for line in lines:
        words = [word.replace("/src", str(PROJECT)) for word in shlex.split(line)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, "--dry-run", "--no-index", "--no-build-isolation"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "does not provide the extra" not in done.stderr
        assert re.search(r"Would install train-launcher-\S+$", done.stdout.strip()), done.stdout


def test_the_page_copies_what_the_image_installs():
    assert "COPY . /src\n" in PAGE
    assert (PROJECT / "constraints.txt").is_file()
