"""Preparing beyond one machine: the text of its jobs, and what is refused before anything is queued."""

from __future__ import annotations

import json
import subprocess

import pytest
from click.testing import CliRunner

from launcher.cli.prepare import command
from launcher.errors import UserError
from launcher.jobs import shards, targets
from launcher.recipe.check import load
from tests.jobs.make import project


@pytest.fixture
def recipe(tmp_path):
    return project(tmp_path)


def job(recipe, *changes, shares=None):
    return shards.render(load(recipe, changes, rules=[targets.problems]).recipe, shares=shares)


def test_slurm_gets_an_array_and_a_merge_that_waits_for_its_success(recipe, tmp_path):
    rendered = job(
        recipe, "cluster.target=slurm", "cluster.slurm.partition=cpu", "cluster.slurm.cpus_per_node=8",
        "cluster.slurm.exclusive=false",
        "cluster.setup=[module load x]", "cluster.env=[HUB_TOKEN]", shares=5,
    ).rendered  # fmt: skip
    assert set(rendered.files) == {"recipe.yaml", "shards.sbatch", "merge.sbatch", "submit.sh"}
    assert rendered.files["shards.sbatch"] == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=tiny-shards\n"
        "#SBATCH --partition=cpu\n"
        "#SBATCH --nodes=1\n"
        "#SBATCH --ntasks-per-node=1\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --mem=0\n"
        "#SBATCH --requeue\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --array=0-4\n"
        "#SBATCH --output=shards-%A_%a.out\n"
        "\n"
        "# One of 5 shares of the tokenising of tiny.\n"
        "# Submit it from the folder that holds recipe.yaml, as submit.sh does.\n"
        "# Others' set-up lines may read variables that are not set, so -u comes behind them.\n"
        "set -eo pipefail\n"
        "module load x\n"
        "set -u\n"
        ': "${HUB_TOKEN:?cluster.env names it, but cluster.setup has run and left it unset}"\n'
        "if ! command -v launcher >/dev/null; then\n"
        '  echo "launcher: not found on $(hostname); activate its environment in cluster.setup" >&2\n'
        "  exit 127\n"
        "fi\n"
        'exec launcher prepare recipe.yaml --shards "$SLURM_ARRAY_TASK_ID/5"\n'
    )
    assert rendered.files["merge.sbatch"].endswith("exec launcher prepare recipe.yaml\n")
    assert '--dependency=afterok:"${shards%%;*}" --kill-on-invalid-dep=yes merge.sbatch' in rendered.files["submit.sh"]
    written = json.loads(rendered.files["recipe.yaml"].partition("\n")[2])
    assert written["data"]["cache_dir"] == str(tmp_path / "cache")


@pytest.mark.parametrize("file", ["shards.sbatch", "merge.sbatch", "submit.sh"])
def test_the_scripts_are_bash(recipe, file):
    text = job(recipe, "cluster.target=slurm", "cluster.nodes=2").rendered.files[file]
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_each_job_has_a_process_for_each_core_that_slurm_gives_it_unless_the_recipe_says(recipe):
    free = job(recipe, "cluster.target=slurm", "data.num_workers=null").rendered.files["shards.sbatch"]
    assert 'data.num_workers="${SLURM_CPUS_ON_NODE:-1}"' in free


def test_ray_gets_one_driver_of_all_tasks(recipe):
    made = job(recipe, "cluster.target=ray", "cluster.ray.address=http://head:8265", "cluster.nodes=2")
    assert made.shares == 2
    assert set(made.rendered.files) == {"recipe.yaml", "runtime_env.json", "submit.sh"}
    assert made.rendered.files["submit.sh"].endswith("-- python -m launcher.jobs.ray_shards recipe.yaml 2\n")


@pytest.mark.parametrize(
    ("changes", "shares", "why"),
    [
        (["cluster.target=torchrun"], None, "expected one of slurm, ray"),
        (["cluster.target=slurm"], 1001, "-n 1001: expected 1 to 1000"),
        (["cluster.target=ray", "cluster.ray.address=local"], None, "expected a cluster of several machines"),
        (
            ["cluster.target=slurm", "cluster.slurm.container.runtime=pyxis", "cluster.slurm.container.image=a.sqsh"],
            None,
            "expected none for prepare",
        ),
    ],
)  # fmt: skip
def test_what_such_jobs_cannot_do_is_refused(recipe, changes, shares, why):
    with pytest.raises(UserError, match=why):
        job(recipe, *changes, shares=shares)


def test_files_are_written_and_the_command_is_told(recipe, tmp_path):
    done = CliRunner().invoke(command, [str(recipe), "--target", "slurm", "-n", "2", "-o", str(tmp_path / "job")])
    assert done.exit_code == 0, done.output
    assert "bash submit.sh" in done.output
    assert (tmp_path / "job" / "shards.sbatch").exists()


@pytest.mark.parametrize("options", [["--submit"], ["-n", "2"], ["--target", "slurm", "--json"]])
def test_options_that_do_not_belong_together_are_refused(recipe, options):
    done = CliRunner().invoke(command, [str(recipe), *options])
    assert isinstance(done.exception, UserError)
    assert "expected with" in str(done.exception) or "expected without" in str(done.exception)
