"""`python -m launcher.jobs._slurm [FOLDER]`: writes the scripts of slurm/, each as `launcher render` gives it.

All start one recipe, Llama-3.1 8B, whose run lies in /shared/runs, each with a preset of `recipes/cluster/`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.jobs.spec import JobSpec, job_spec
from launcher.jobs.sweep import expand, parse
from launcher.jobs.targets import slurm
from launcher.jobs.targets.slurm_script import FILE
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.schema import Recipe
from launcher.shipped import folder

RECIPE = "llama3.1-8b-fsdp2.yaml"
PRESETS = {  # script -> preset of the cluster section
    "single-node": "slurm-single-node",
    "multi-node": "slurm-multi-node",
    "gpu-tasks": "slurm-gpu-tasks",
    "container-pyxis": "slurm-pyxis",
    "container-apptainer": "slurm-apptainer",
    "requeue": "slurm-requeue",
    "array": "slurm-single-node",
}
SWEEPS = {"array": "optimizer.lr=1e-5,3e-5,1e-4"}


def overrides(script: str) -> list[str]:
    """What is changed in the recipe; whether 8B parameters fit is not asked, so no machine's cache matters."""
    names = ["run.dir=/shared/runs", f"run.name={script}"]
    return ["strategy=fsdp2", f"cluster={PRESETS[script]}", "cluster.gpu_memory_gib=null", *names]


def files() -> Iterator[tuple[str, str]]:
    """Name in slurm/, and text."""
    for script in PRESETS:
        if sweep := SWEEPS.get(script):
            name, recipes = expand(_load, overrides(script), parse([sweep]))
            rendered = slurm.render_sweep([_spec(recipe) for recipe in recipes], name=name)
        else:
            rendered = slurm.render(_spec(_load(overrides(script))))
        yield f"{script}.sbatch", rendered.files[FILE]


def main(target: Path) -> None:
    """Write them all."""
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files():
        (target / name).write_text(text)


def _load(changes: Sequence[str]) -> Recipe:
    return load(folder("recipes") / RECIPE, changes).recipe


def _spec(recipe: Recipe) -> JobSpec:
    return job_spec(recipe, make_plan(recipe))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder("slurm"))
