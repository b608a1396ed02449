"""The plan: what follows from a recipe by arithmetic alone; what needs the data is null until prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.plan.batch import accumulation_steps
from launcher.plan.fit import memory_problems
from launcher.plan.memory import HostMemory, Memory, estimate
from launcher.plan.mesh import Mesh, make_mesh, world_size
from launcher.plan.parameters import (
    Config,
    Parameters,
    Weight,
    count,
    read_config,
    row_cost,
    unknown_family,
    weights,
    with_adapters,
)
from launcher.plan.traffic import Traffic, traffic
from launcher.recipe.schema import Recipe

__all__ = [
    "VERSION", "Memory", "Mesh", "Parameters", "Plan", "Traffic", "architecture", "make_plan", "memory_problems",
    "row_cost",
]  # fmt: skip

VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What follows from a recipe.

    version: of this shape, as `launcher plan --json` and plan.json hold it
    nodes, nproc_per_node, world_size: machines, ranks on each, ranks in all
    mesh: copies of the model state, and ranks that share one
    global_batch_size, micro_batch_size: rows of one optimizer step, rows of one rank's forward
    accumulation_steps: forwards of each rank in one optimizer step
    seq_len: longest row, in tokens
    tokens_per_step: upper bound, every row full
    max_steps, epochs: as the recipe says; one of them is None
    parameters: counts, or None and the reason in `parameters_note`
    memory: bytes on the fullest rank and its node, or None where parameters are
    traffic: bytes that a rank sends in an optimizer step, or None where parameters are
    precision: arithmetic type; auto is settled by the device on the rank
    rows, steps_per_epoch, total_steps: None until the data is prepared
    """

    version: int = VERSION
    nodes: int
    nproc_per_node: int
    world_size: int
    mesh: Mesh
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    seq_len: int
    tokens_per_step: int
    max_steps: int | None
    epochs: float | None
    parameters: Parameters | None
    parameters_note: str
    memory: Memory | None
    traffic: Traffic | None
    precision: str
    rows: int | None = None
    steps_per_epoch: float | None = None
    total_steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; docs/json.md describes them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` made."""
        nested: dict[str, Any] = {"mesh": Mesh, "parameters": Parameters, "memory": _memory, "traffic": Traffic}
        return Plan(**{k: nested[k](**v) if k in nested and v is not None else v for k, v in values.items()})


def _memory(host: Mapping[str, int], **parts: int) -> Memory:
    return Memory(host=HostMemory(**host), **parts)


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a checked recipe. Pure but for reading a model folder's config.json."""
    train, world, mesh = recipe.train, world_size(recipe), make_mesh(recipe)
    config, note = read_config(recipe.model.name, recipe.model.config, recipe.model.revision)
    known = architecture(recipe)
    if config is not None and known is None:
        note = unknown_family(config)
    return Plan(
        nodes=recipe.cluster.nodes,
        nproc_per_node=recipe.cluster.nproc_per_node,
        world_size=world,
        mesh=mesh,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        accumulation_steps=accumulation_steps(
            global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size, world_size=world
        ),
        seq_len=recipe.data.seq_len,
        tokens_per_step=train.global_batch_size * recipe.data.seq_len,
        max_steps=train.max_steps,
        epochs=train.epochs,
        parameters=count(
            *known, recipe.data.seq_len, recompute=recipe.model.gradient_checkpointing in ("full", "offload")
        )
        if known
        else None,
        parameters_note=note,
        memory=estimate(recipe, *known, mesh) if known else None,
        traffic=traffic(recipe, *known, mesh) if known else None,
        precision=train.precision,
    )


def architecture(recipe: Recipe) -> tuple[Config, list[Weight]] | None:
    """The model's config and its weights, adapters among them; None where no formula knows it, or it is not here."""
    config, _ = read_config(recipe.model.name, recipe.model.config, recipe.model.revision)
    found = weights(config) if config is not None else None
    if config is None or found is None:
        return None
    if recipe.adapter.kind != "full":
        found = with_adapters(found, recipe.adapter.rank, recipe.adapter.targets)
    return config, found
