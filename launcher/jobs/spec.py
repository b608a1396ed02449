"""The job spec: what is to be started, as frozen data. Targets turn it into text; nothing here reads the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.plan import Plan
from launcher.recipe.schema import Recipe, to_dict
from launcher.strategy import accelerate, engine_settings, settings_file

ENDPOINT = "LAUNCHER_RENDEZVOUS"  # variable with HOST:PORT of node 0, in jobs of several nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be started.

    name: of the run
    nodes, nproc_per_node: machines and ranks on each
    argv: what each rank runs, without the interpreter
    env: settings that every process gets, never secrets
    env_names: variables that must be set where the job starts; their values are never read here
    setup: shell lines run first on each node
    time_limit_min: minutes after which the run stops as if preempted; None: never
    files: name to text, stored beside what a target renders
    accelerate: what Accelerate's configuration file says of this job, for the target that writes one
    """

    name: str
    nodes: int
    nproc_per_node: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    env_names: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    time_limit_min: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    accelerate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A job as text. files: name to text; command: what a person types in their folder, a line a node."""

    files: Mapping[str, str]
    command: str


def job_spec(recipe: Recipe, plan: Plan) -> JobSpec:
    """The job of a checked recipe, whose `run.name` is settled."""
    assert recipe.run.name is not None
    files = {
        "recipe.yaml": recipe_text(recipe),
        "plan.json": json.dumps(plan.to_dict(), indent=2) + "\n",
        settings_file(recipe): json.dumps(engine_settings(recipe, plan), indent=2) + "\n",
    }
    return JobSpec(
        name=recipe.run.name,
        nodes=plan.nodes,
        nproc_per_node=plan.nproc_per_node,
        argv=("-m", "launcher.trainer", str(Path(recipe.run.dir, recipe.run.name).absolute())),
        env=_environment(recipe),
        env_names=tuple(recipe.cluster.env),
        setup=tuple(recipe.cluster.setup),
        time_limit_min=recipe.cluster.time_limit_min,
        files=files,
        accelerate=accelerate.config(recipe, plan),
    )


def _environment(recipe: Recipe) -> dict[str, str]:
    """Accelerate imports DeepSpeed where the job starts, which else warns that it found no GPU to train on."""
    zero_on_cpu = recipe.strategy.kind.startswith("zero") and recipe.cluster.accelerator == "cpu"
    return {"DS_ACCELERATOR": "cpu"} if zero_on_cpu else {}


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe in the part of YAML that is also JSON, so that it can be read without a YAML library."""
    header = f"# Resolved by launcher {__version__}: every key, presets and overrides applied.\n"
    return header + json.dumps(to_dict(recipe), indent=2) + "\n"


def stop_after_s(time_limit_min: int) -> int:
    """Seconds after which a run asks itself to stop: a tenth of the limit early, at most 5 minutes, to save."""
    return time_limit_min * 60 - min(300, time_limit_min * 6)
