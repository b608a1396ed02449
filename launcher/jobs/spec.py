"""The job spec: what is to be started, as frozen data. Targets turn it into text; nothing here reads the machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.plan import Plan
from launcher.plan.saving import stop_lead_s
from launcher.recipe.schema import Cluster, Recipe, to_dict
from launcher.strategy import accelerate, engine_settings, settings_file

ENDPOINT = "LAUNCHER_RENDEZVOUS"  # variable with HOST:PORT of node 0, in jobs of several nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be started.

    name: of the run
    run: its directory, absolute, as the nodes see it
    cluster: the recipe's section: the machines, and the keys of each target
    env: settings that every process gets, never secrets
    files: name to text, stored beside what a target renders
    accelerate: what Accelerate's configuration file says of this job, for the target that writes one
    code: folder of the copied code that the job runs from (`launcher.jobs.snapshot`); None: what is installed
    submission: number of this hand-over among the run's, for targets whose jobs need names of their own
    """

    name: str
    run: str = ""
    cluster: Cluster = field(default_factory=Cluster)
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    accelerate: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    submission: int = 1

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.cluster.nodes

    @property
    def nproc_per_node(self) -> int:
        """Ranks on each machine."""
        return self.cluster.nproc_per_node

    @property
    def argv(self) -> tuple[str, ...]:
        """What each rank runs, without the interpreter."""
        return ("-m", "launcher.trainer", self.run)

    @property
    def env_names(self) -> tuple[str, ...]:
        """Variables that must be set where the job starts; their values are never read here."""
        return tuple(self.cluster.env)

    @property
    def setup(self) -> tuple[str, ...]:
        """Shell lines run first on each node."""
        return tuple(self.cluster.setup)

    @property
    def time_limit_min(self) -> int | None:
        """Minutes after which the run stops as if preempted; None: never."""
        return self.cluster.time_limit_min

    @property
    def stop_lead_s(self) -> int:
        """Seconds before that limit at which it is asked to, and what a preempted one is given."""
        return stop_lead_s(self.cluster)

    @property
    def code_lines(self) -> tuple[str, ...]:
        """Shell lines, behind set-up and environment, that make Python look through the copied code first."""
        if self.code is None:
            return ()
        where, path = shlex.quote(self.code), ":".join(shlex.quote(place) for place in places(self.code))
        return (
            "# The code as it was when the job was submitted.",
            f"[[ -d {where} ]] || {{ echo {where}': not there, only launcher submit copies the code' >&2; exit 2; }}",
            f'export PYTHONSAFEPATH=1 PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """A job as text. files: name to text; command: what a person types in their folder, a line a node."""

    files: Mapping[str, str]
    command: str


def places(code: str | Path) -> list[str]:
    """The folders of copied code that Python is to look through; one that is not there is passed over."""
    return [str(Path(code, "package")), str(Path(code, "repository"))]


def job_spec(recipe: Recipe, plan: Plan) -> JobSpec:
    """The job of a checked recipe, whose `run.name` is settled."""
    assert recipe.run.name is not None
    files = {
        "recipe.yaml": recipe_text(recipe),
        "plan.json": json.dumps(plan.to_dict(), indent=2) + "\n",
        settings_file(recipe): json.dumps(engine_settings(recipe, plan), indent=2) + "\n",
    }
    return replace(bare_spec(recipe), files=files, accelerate=accelerate.config(recipe, plan))


def bare_spec(recipe: Recipe) -> JobSpec:
    """The job without what follows from the plan: enough to say what a target cannot do, of a faulty recipe too."""
    name = recipe.run.name or ""
    run = str(Path(recipe.run.dir, name).absolute())
    return JobSpec(name=name, run=run, cluster=recipe.cluster, env=_environment(recipe))


def _environment(recipe: Recipe) -> dict[str, str]:
    """Accelerate imports DeepSpeed where the job starts, which else warns that it found no GPU to train on."""
    zero_on_cpu = recipe.strategy.kind.startswith("zero") and recipe.cluster.accelerator == "cpu"
    return {"DS_ACCELERATOR": "cpu"} if zero_on_cpu else {}


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe in the part of YAML that is also JSON, so that it can be read without a YAML library."""
    header = f"# Resolved by launcher {__version__}: every key, presets and overrides applied.\n"
    return header + json.dumps(to_dict(recipe), indent=2) + "\n"


def stop_after_s(cluster: Cluster) -> int | None:
    """Seconds after its start at which a run asks itself to stop, early enough to save; None: never."""
    return None if cluster.time_limit_min is None else max(1, cluster.time_limit_min * 60 - stop_lead_s(cluster))
