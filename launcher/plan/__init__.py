"""The plan: what follows from a recipe by arithmetic alone; what needs the data is null until prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.plan.batch import accumulation_steps
from launcher.plan.memory import Memory, memory_problems, model_state
from launcher.plan.mesh import Mesh, make_mesh, world_size
from launcher.plan.parameters import Parameters, count, read_config, unknown_family, weights
from launcher.recipe.schema import Recipe

__all__ = ["VERSION", "Memory", "Mesh", "Parameters", "Plan", "make_plan", "memory_problems"]

VERSION = 1


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
    memory: model state on the fullest rank in bytes, or None where parameters are
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
        nested: dict[str, Any] = {"mesh": Mesh, "parameters": Parameters, "memory": Memory}
        return Plan(**{k: nested[k](**v) if k in nested and v is not None else v for k, v in values.items()})


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a checked recipe. Pure but for reading a model folder's config.json."""
    train, world, mesh = recipe.train, world_size(recipe), make_mesh(recipe)
    config, note = read_config(recipe.model.name, recipe.model.config, recipe.model.revision)
    shapes = weights(config) if config is not None else None
    if config is not None and shapes is None:
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
        parameters=count(config, recipe.data.seq_len) if config is not None and shapes is not None else None,
        parameters_note=note,
        memory=model_state(shapes, mesh, recipe.model.dtype) if shapes is not None else None,
        precision=train.precision,
    )
