"""Whether what started this rank agrees with the run: Accelerate's file and variables against recipe and plan.

The trainer builds its engine from the run's recipe alone, so a setting of Accelerate that says something else would be
ignored without a word. It is refused instead. Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_USER_ERROR, UserError, show_value
from launcher.plan import Plan
from launcher.recipe.schema import Recipe, from_dict
from launcher.run.directory import RunDirectory
from launcher.strategy.explained import dotted

LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it, whatever the file says
_GRACE_S = 3.0  # for rank 0 to say what is wrong before torchrun ends it

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """source: variable or key of a file that says `theirs`; key: of the recipe or the plan, which says `ours`."""

    source: str
    theirs: Any
    key: str
    ours: Any

    def __str__(self) -> str:
        return f"{self.source} = {show_value(self.theirs)}, but {self.key} = {show_value(self.ours)}"


def require_agreement(run: RunDirectory) -> None:
    """Raises UserError on rank 0, naming both sides of every contradiction; the other ranks end without a word."""
    if LAUNCHED not in os.environ:
        return
    recipe, plan = from_dict(run.read_recipe()), Plan.from_dict(run.read_json(run.plan_file.name))
    found = list(contradictions(recipe, plan, os.environ))
    if not found:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_GRACE_S)
        os._exit(EXIT_USER_ERROR)
    listed = "\n".join(f"  {one}" for one in found)
    raise UserError(
        f"{run.path}: Accelerate's settings contradict the run's recipe, which decides:\n{listed}\n"
        f"`launcher render {run.recipe_file} --target accelerate` writes a file that agrees; torchrun needs none."
    )


def other_precision(recipe: Recipe, settled: str, environment: Environment) -> str | None:
    """A line for the log where `train.precision: auto` settled on another type on this device than Accelerate says.

    settled: fp32, bf16 or fp16
    """
    if recipe.train.precision != "auto" or recipe.model.dtype == "bf16" or LAUNCHED not in environment:
        return None
    source, theirs = f"mixed_precision ({LAUNCHED})", environment[LAUNCHED].lower()
    if file := _file(environment):
        said = dotted(_read(file) or {})
        source, theirs = f"bf16.enabled ({file})", "bf16" if said.get("bf16.enabled") is True else "no"
    if theirs == {"fp32": "no"}.get(settled, settled):
        return None
    return f"Accelerate's {source} = {theirs}, but train.precision = auto settles on {settled} here, which decides"


def contradictions(recipe: Recipe, plan: Plan, environment: Environment) -> Iterator[Contradiction]:
    """Every setting in the environment that the run says otherwise; nothing for one that Accelerate would not read."""
    yield from _engine(recipe, environment)
    yield from _ranks(plan, environment)
    yield from _precision(recipe, environment)
    yield from _compile(recipe, environment)
    if _true(environment, "ACCELERATE_USE_FSDP") and recipe.strategy.kind == "fsdp2":
        yield from _fsdp(recipe, plan, environment)
    if _true(environment, "ACCELERATE_USE_DEEPSPEED") and recipe.strategy.kind.startswith("zero"):
        yield from _deepspeed(recipe, plan, environment)


def _engine(recipe: Recipe, environment: Environment) -> Iterator[Contradiction]:
    kind = recipe.strategy.kind
    uses = {
        "ACCELERATE_USE_MEGATRON_LM": False,
        "ACCELERATE_USE_FSDP": kind == "fsdp2",
        "ACCELERATE_USE_DEEPSPEED": kind.startswith("zero"),
    }
    for name, agrees in uses.items():
        launched = LAUNCHED in environment
        if _true(environment, name) and not agrees:
            yield Contradiction(name, True, "strategy.kind", kind)
        elif launched and agrees and not _true(environment, name):
            yield Contradiction(name, environment.get(name, "(not set)"), "strategy.kind", kind)


def _ranks(plan: Plan, environment: Environment) -> Iterator[Contradiction]:
    """Under plain torchrun no file says a number, and fewer ranks go on with a run; Accelerate's file says one."""
    world = environment.get("WORLD_SIZE", "")
    if LAUNCHED in environment and world.isdigit() and int(world) != plan.world_size:
        key = "cluster.nodes x cluster.nproc_per_node"
        yield Contradiction("num_processes (WORLD_SIZE)", int(world), key, plan.world_size)


def _precision(recipe: Recipe, environment: Environment) -> Iterator[Contradiction]:
    theirs = environment.get(LAUNCHED, "").lower()
    if not theirs or (theirs == "no" and _file(environment)):
        return  # a DeepSpeed file says it
    precision, dtype = recipe.train.precision, recipe.model.dtype
    # the device settles auto; weights in bf16 need no autocast
    agreeing = {"no", "bf16"} if precision == "auto" or dtype == "bf16" else {_WORDS.get(precision, precision)}
    if theirs not in agreeing:
        key, ours = ("model.dtype", dtype) if dtype == "bf16" else ("train.precision", precision)
        yield Contradiction(f"mixed_precision ({LAUNCHED})", theirs, key, ours)


_WORDS = {"fp32": "no"}


def _compile(recipe: Recipe, environment: Environment) -> Iterator[Contradiction]:
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND")
    if backend is not None and (backend.upper() != "NO") != recipe.model.compile:
        name = "dynamo_backend (ACCELERATE_DYNAMO_BACKEND)"
        yield Contradiction(name, backend, "model.compile", recipe.model.compile)


def _fsdp(recipe: Recipe, plan: Plan, environment: Environment) -> Iterator[Contradiction]:
    strategy, recompute = recipe.strategy, recipe.model.gradient_checkpointing
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        yield Contradiction("FSDP_VERSION", version, "strategy.kind", "fsdp2")
    flags = (
        ("FSDP_RESHARD_AFTER_FORWARD", bool(strategy.reshard_after_forward),
         "strategy.reshard_after_forward", strategy.reshard_after_forward),
        ("FSDP_OFFLOAD_PARAMS", strategy.offload.params == "cpu", "strategy.offload.params", strategy.offload.params),
        ("FSDP_ACTIVATION_CHECKPOINTING", recompute in ("full", "offload"), "model.gradient_checkpointing", recompute),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", recompute == "offload", "model.gradient_checkpointing", recompute),
    )  # fmt: skip
    for name, expected, key, ours in flags:
        if name in environment and _true(environment, name) != expected:
            yield Contradiction(name, environment[name], key, ours)
    yield from _mesh(plan, environment)


def _mesh(plan: Plan, environment: Environment) -> Iterator[Contradiction]:
    prefix = "PARALLELISM_CONFIG_"
    if not _true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if plan.mesh.replicate > 1:
            yield Contradiction("parallelism_config", "(not set)", "mesh.replicate", plan.mesh.replicate)
        return
    sizes = {"DP_REPLICATE": plan.mesh.replicate, "DP_SHARD": plan.mesh.shard, "TP": 1, "CP": 1, "SP": 1}
    for axis, ours in sizes.items():
        theirs = environment.get(f"{prefix}{axis}_SIZE", "1")
        if theirs != str(ours):
            key = {"DP_REPLICATE": "mesh.replicate", "DP_SHARD": "mesh.shard"}.get(axis, f"ranks on the axis {axis}")
            yield Contradiction(f"{prefix}{axis}_SIZE", theirs, key, ours)


def _deepspeed(recipe: Recipe, plan: Plan, environment: Environment) -> Iterator[Contradiction]:
    ours = _expected(recipe, plan)
    if file := _file(environment):
        yield from _in_file(file, ours)
        return  # Accelerate refuses the variables beside a file
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # its default
    said = {
        "zero_optimization.stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage),
        **{
            key: (name, environment[name])
            for key, name in _VARIABLES.items()
            if environment.get(name, "auto") != "auto"
        },
    }  # fmt: skip
    for key, (name, theirs) in said.items():
        if not _same(theirs, ours[key][1]):
            yield Contradiction(name, theirs, *ours[key])


_VARIABLES = {
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "zero_optimization.offload_optimizer.device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "zero_optimization.offload_param.device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}


def _expected(recipe: Recipe, plan: Plan) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's key -> the key that says it here, and its value."""
    strategy, precision = recipe.strategy, recipe.train.precision
    rows = plan.micro_batch_size * plan.accumulation_steps * plan.world_size
    found: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", rows),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", plan.micro_batch_size),
        "gradient_accumulation_steps": ("accumulation_steps of the plan", plan.accumulation_steps),
        "gradient_clipping": ("train.max_grad_norm", recipe.train.max_grad_norm or 0.0),
        "zero_optimization.stage": ("stage of strategy.kind", int(strategy.kind[-1])),
        "zero_optimization.offload_optimizer.device": ("strategy.offload.optimizer", strategy.offload.optimizer),
        "zero_optimization.offload_param.device": ("strategy.offload.params", strategy.offload.params),
    }
    found["fp16.enabled"] = (f"train.precision = {precision}, fp16", precision == "fp16")
    if precision != "auto":  # the device settles it, `other_precision` says how
        found["bf16.enabled"] = (f"train.precision = {precision}, bf16", precision == "bf16")
    return found


def _in_file(file: str, ours: dict[str, tuple[str, Any]]) -> Iterator[Contradiction]:
    theirs = _read(file)
    if theirs is None:
        yield Contradiction("deepspeed_config_file", f"{file}, which is not JSON", "the run", "a plan of its own")
        return
    if not theirs:
        return
    said = dotted(theirs)
    for device in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        said.setdefault(device, "none")
    for key, (name, value) in ours.items():
        if key in said and said[key] != "auto" and not _same(said[key], value):
            yield Contradiction(f"{key} ({file})", said[key], name, value)
    for section in ("optimizer", "scheduler"):
        if section in theirs:
            yield Contradiction(f"{section} ({file})", "{...}", "the section optimizer", "that of the recipe")


def _read(file: str) -> dict[str, Any] | None:
    """A DeepSpeed file; empty where there is none, which says nothing, and None where it is no JSON object."""
    try:
        theirs = json.loads(Path(file).read_text())
    except OSError:
        return {}
    except ValueError:
        return None
    return theirs if isinstance(theirs, dict) else None


def _file(environment: Environment) -> str:
    """The DeepSpeed file that Accelerate was told of, or nothing."""
    name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return "" if name == "none" or not _true(environment, "ACCELERATE_USE_DEEPSPEED") else name


def _true(environment: Environment, name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _same(theirs: Any, ours: Any) -> bool:
    """Whether a text or number of theirs is our value."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return str(theirs).lower() == str(ours).lower()
    if isinstance(ours, (int, float)):
        try:
            return float(theirs) == float(ours)
        except (TypeError, ValueError):
            return False
    return str(theirs).lower() == str(ours).lower()
