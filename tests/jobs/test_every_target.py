"""L12: every target x {ddp, fsdp2, zero3-offload} x {1 node, 2 x 8} as whole files; what all targets have in common.

LAUNCHER_REFRESH_GOLDEN=1 keeps the new files instead of comparing, for a person to review.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import __version__
from launcher.jobs import targets
from launcher.jobs.spec import JobSpec, Rendered, job_spec
from launcher.jobs.targets import TARGETS, render
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.shipped import folder

GOLDEN = Path(__file__).parent / "golden" / "every"
RECIPE = folder("recipes") / "llama3.1-8b-fsdp2.yaml"
STRATEGIES = ("ddp", "fsdp2", "zero3-offload")
SIZES = {"1x8": "cluster=node8", "2x8": "cluster=node8x2"}
COMMON = ("plan.json", "fsdp2.json", "ddp.json", "deepspeed.json")  # files of a job that no target changes
NEEDED = {  # what a target cannot do without
    "kubernetes": ["cluster.kubernetes.image=ghcr.io/your-team/launcher:0.4.0", "cluster.kubernetes.claim=training",
                   "cluster.kubernetes.secret=launcher-env"],
    "ray": ["cluster.ray.address=http://head:8265"],
}  # fmt: skip
ASKED = ["run.name=golden", "run.dir=/shared/runs", "cluster.gpu_memory_gib=null", "cluster.time_limit_min=60",
         "cluster.env=[HF_TOKEN]", "cluster.setup=[source /shared/venv/bin/activate]"]  # fmt: skip


def job(target: str, strategy: str = "fsdp2", size: str = "2x8", *changes: str) -> JobSpec:
    asked = [SIZES[size], f"strategy={strategy}", *ASKED, f"cluster.target={target}", *NEEDED.get(target, []), *changes]
    recipe = load(RECIPE, asked, rules=[targets.problems]).recipe
    return job_spec(recipe, make_plan(recipe))


def compare(name: Path, text: str) -> None:
    file, text = GOLDEN / name, text.replace(f"launcher {__version__}", "launcher VERSION")
    if os.environ.get("LAUNCHER_REFRESH_GOLDEN") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.is_file(), f"{file} is missing"
    assert text == file.read_text()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target", TARGETS)
def test_l12_the_job_matches_its_golden_files(target, strategy, size):
    files = dict(render(job(target, strategy, size), target=target).files)
    files.pop("recipe.yaml")  # the recipe itself, every key; launcher.recipe's tests compare it
    own = {name: text for name, text in files.items() if name not in COMMON}
    for name, text in files.items():
        compare(Path("common" if name in COMMON else target, f"{strategy}-{size}", name), text)
    kept = {path.name for path in (GOLDEN / target / f"{strategy}-{size}").iterdir()}
    assert kept == set(own), "a golden file that no job has"


def test_no_golden_file_is_of_nothing_that_is_rendered():
    kept = {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*")}
    jobs = {f"{strategy}-{size}" for strategy in STRATEGIES for size in SIZES}
    assert kept == {f"{where}/{name}" for where in (*TARGETS, "common") for name in jobs}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", sorted(folder("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_rendered_for_every_target(path, target):
    changes = [f"cluster.target={target}", "run.dir=/shared/runs", *NEEDED.get(target, [])]
    recipe = load(path, changes, rules=[targets.problems]).recipe
    rendered = render(job_spec(recipe, make_plan(recipe)), target=target)
    assert rendered.command
    assert len(rendered.files) >= 4


@pytest.mark.parametrize("target", TARGETS)
def test_l12_a_secret_is_in_no_text_and_the_environment_changes_nothing(target, monkeypatch):
    before = render(job(target), target=target)
    monkeypatch.setenv("HF_TOKEN", "the-secret-value")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    after = render(job(target), target=target)
    assert before == after
    assert "the-secret-value" not in str(after)
    assert "HF_TOKEN" in str(after)


def scripts(rendered: Rendered) -> dict[str, str]:
    return {name: text for name, text in rendered.files.items() if name.endswith((".sh", ".sbatch"))}


@pytest.mark.parametrize("snapshot", ["false", "true"])
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "kubernetes"])
def test_scripts_pass_shellcheck(target, snapshot, tmp_path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra dev)")
    from dataclasses import replace

    for size in SIZES:
        spec = job(target, "fsdp2", size)
        if snapshot == "true":
            spec = replace(spec, code="/shared/runs/golden/job/code-0123")
        for name, text in scripts(render(spec, target=target)).items():
            (tmp_path / f"{size}-{name}").write_text(text)
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert len(files) >= 2
    command = [shellcheck, "--shell=bash", "--exclude=SC1091", *files]  # SC1091: what `source` names is not here
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_rendering_imports_neither_torch_nor_a_schedulers_library(target):
    code = f"""
import sys
from tests.jobs.test_every_target import job
from launcher.jobs.targets import render
assert render(job({target!r}), target={target!r}).files
heavy = {{"torch", "ray", "kubernetes", "transformers", "deepspeed", "accelerate", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_job_of_4096_nodes_is_rendered_in_a_second_and_grows_only_where_each_node_has_a_script(target):
    changes = ["train.global_batch_size=65536"]
    small = render(job(target, "fsdp2", "2x8", *changes), target=target)
    began = time.process_time()
    large = render(job(target, "fsdp2", "2x8", *changes, "cluster.nodes=4096"), target=target)
    assert time.process_time() - began < 5  # a fifth of it here; a busy machine counts more
    numbered = re.compile(r"node-\d+\.sh")
    shared = {name: len(text) for name, text in large.files.items() if not numbered.fullmatch(name)}
    for name, size in shared.items():
        assert size <= len(small.files[name]) + 64, name
    if target in ("torchrun", "accelerate"):
        assert len(large.files) - len(small.files) == 4096 - 2
    else:
        assert set(large.files) == set(small.files)


@pytest.mark.parametrize("target", TARGETS)
def test_no_shell_variable_is_in_a_line_that_slurm_reads(target):
    for text in scripts(render(job(target), target=target)).values():
        assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "$" in line]
