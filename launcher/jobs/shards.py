"""`prepare` on several machines: which jobs a recipe's data become on a target, rendered and handed over.

The jobs run `launcher prepare`: each of the first a share of the shards, the last what is left, which is packing.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.data.cache import cache_folder
from launcher.errors import UserError
from launcher.jobs.spec import JobSpec, Rendered, bare_spec, recipe_text
from launcher.recipe.schema import Recipe
from launcher.recipe.schema.ray import LOCAL

TARGETS = ("slurm", "ray")
MOST = 1000  # shares; Slurm's default for the largest array is 1001


@dataclass(frozen=True, slots=True)
class SharesJob:
    """The jobs as text. shares: how many tokenise."""

    spec: JobSpec
    rendered: Rendered
    shares: int


def render(recipe: Recipe, *, shares: int | None) -> SharesJob:
    """The jobs for the recipe's target.

    Args:
        shares: how many jobs tokenise; None: one for each of cluster.nodes.
    Raises:
        UserError: the target queues no jobs, or the recipe asks what they cannot do.
    """
    target, shares = recipe.cluster.target, shares or recipe.cluster.nodes
    if target not in TARGETS:
        raise UserError(f"prepare --target {target}: expected one of {', '.join(TARGETS)}; here: launcher prepare.")
    if not 1 <= shares <= MOST:
        raise UserError(f"-n {shares}: expected 1 to {MOST} shares.")
    recipe = deepcopy(recipe)
    recipe.data.cache_dir = str(cache_folder(recipe))
    spec = replace(bare_spec(recipe), files={"recipe.yaml": recipe_text(recipe)})
    if target == "slurm":
        if (runtime := recipe.cluster.slurm.container.runtime) != "none":
            raise UserError(
                f"cluster.slurm.container.runtime = {runtime}: expected none for prepare --target slurm. Write jobs of "
                "your own that call launcher prepare --shards I/N inside the container, then launcher prepare."
            )
        from launcher.jobs.targets import slurm_shards

        return SharesJob(spec, slurm_shards.render(spec, shares=shares, num_workers=recipe.data.num_workers), shares)
    if recipe.cluster.ray.address == LOCAL:
        raise UserError(
            f"cluster.ray.address = {LOCAL}: expected a cluster of several machines; here: launcher prepare."
        )
    from launcher.jobs.targets import ray

    about = f"Tokenises and packs the data of {spec.name} in {shares} shares, on a Ray cluster."
    return SharesJob(spec, ray.cluster_job(spec, _ray_words(spec, shares), about=about), shares)


def new_folder(recipe: Recipe) -> Path:
    """A folder for the files of a submission, beside the run's directory."""
    parent = Path(recipe.run.dir, f"{recipe.run.name}.prepare")
    taken = (int(path.name) for path in parent.glob("*") if path.name.isdigit())
    return parent / str(1 + max(taken, default=0))


def submit(job: SharesJob, folder: Path) -> list[str]:
    """Hand the jobs over, whose files lie in `folder`; says what was submitted and how to look.

    Raises:
        UserError: the target is not reached, or refuses.
    """
    if job.spec.cluster.target == "slurm":
        from launcher.jobs.targets import slurm
        from launcher.jobs.targets.slurm_shards import AFTER, MERGE, SHARDS

        shards, _ = slurm.sbatch(job.spec, folder, SHARDS)
        try:
            merge, _ = slurm.sbatch(job.spec, folder, MERGE, f"{AFTER[0]}{shards}", *AFTER[1:])
        except UserError as error:
            raise UserError(
                f"{error}\nSubmitted before it, and left so: job {shards}. scancel {shards} ends it."
            ) from None
        return [
            f"submitted {job.shares} shares: slurm job {shards}; then the merge: slurm job {merge}",
            f"  look:   squeue -j {shards},{merge}",
            f"  stop:   scancel {shards} {merge}",
        ]
    from launcher.jobs.targets import ray

    done = ray.submit_to_cluster(job.spec, job.rendered, folder, _ray_words(job.spec, job.shares))
    address = done.more["address"]
    return [
        f"submitted {job.shares} shares and the merge: ray job {done.id}",
        f"  look:   ray job logs --address {address} {done.id}",
        f"  stop:   ray job stop --address {address} {done.id}",
    ]


def _ray_words(spec: JobSpec, shares: int) -> list[str]:
    from launcher.jobs.targets.ray import CODE

    folder = ["--folder", CODE] if spec.cluster.ray.working_dir else []
    return ["python", "-m", "launcher.jobs.ray_shards", "recipe.yaml", str(shares), *folder]
