"""Names that a shell would act upon reach the command they are meant for whole, on every target, and nothing else runs.

The rendered scripts themselves run; the programs they call are stand-ins that write down their arguments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.jobs.targets import TARGETS, render
from tests.jobs.test_every_target import job

HOSTILE = "a b'c\"d;touch PWNED;$(touch PWNED)`touch PWNED`&|<>*\\$HOME"
STRICT = ("slurm", "kubernetes")  # their own names allow less: refused in words
PROGRAMS = (
    "launcher", "python", "torchrun", "accelerate", "srun", "scontrol", "squeue", "ray", "nproc", "hostname", "getent",
)  # fmt: skip
_STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print(2 if sys.argv[0].endswith("nproc") else "node1")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of every call of a program that the scripts make."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(_STAND_IN)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name, value in {
        "HF_TOKEN": "$(touch PWNED)", "LAUNCHER_RENDEZVOUS": "node1:1234", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n", "SLURM_JOB_CPUS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "calls"


def run(script: Path) -> None:
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(script.parent)}
    said = script.with_suffix(".said")  # not a pipe, which a script's timer would hold open
    with said.open("w") as output:
        subprocess.run(
            ["bash", script], cwd=script.parent, env=environment, stdout=output, stderr=output, timeout=60, check=False
        )
    assert not re.search("command not found|syntax error|unbound", said.read_text()), said.read_text()


@pytest.mark.parametrize("size", ["1x8", "2x8"])
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "kubernetes"])
def test_a_hostile_run_reaches_the_worker_as_one_argument_and_nothing_else_is_run(target, size, calls, tmp_path):
    place = tmp_path / f"shared {HOSTILE}"
    name = "golden" if target in STRICT else HOSTILE
    spec = job(target, "fsdp2", size, f"run.name={name}", f"run.dir={place}", "cluster.setup=[]")
    folder = tmp_path / "job"
    folder.mkdir()
    rendered = render(spec, target=target)
    for file, text in rendered.files.items():
        (folder / file).write_text(text)
    scripts = [folder / file for file in rendered.files if file.endswith((".sh", ".sbatch"))]
    for script in scripts:
        run(script)
    made = [json.loads(line) for line in calls.read_text().splitlines()]
    whole = [call for call in made if f"{place}/{name}" in call]
    assert whole, f"no call has {place}/{name} as one argument: {made}"
    assert len({tuple(call) for call in whole}) >= len(scripts)
    assert list(tmp_path.rglob("PWNED")) == []


def test_kubernetes_refuses_a_hostile_folder_in_words():
    with pytest.raises(RecipeError, match=r"run\.dir = .*expected a path"):
        job("kubernetes", "fsdp2", "1x8", f"run.dir=/shared/{HOSTILE}")


@pytest.mark.parametrize("target", STRICT)
def test_a_scheduler_that_allows_less_refuses_the_name_in_words(target):
    with pytest.raises(RecipeError, match=r"run\.name = .*expected"):
        job(target, "fsdp2", "1x8", f"run.name={HOSTILE}")


@pytest.mark.parametrize("key", ["name", "dir"])
@pytest.mark.parametrize("target", TARGETS)
def test_line_ends_which_would_leave_a_comment_are_refused(target, key):
    with pytest.raises(RecipeError, match=rf"(?s)run\.{key} = .*without line ends"):
        job(target, "fsdp2", "1x8", f'run.{key}="a\\ntouch PWNED"')
