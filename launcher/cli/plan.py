"""`launcher plan`: prints what follows from a recipe by arithmetic, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.recipe.schema import Recipe


@click.command(short_help="Print what follows from a recipe by arithmetic.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one object (docs/json.md).")
def command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print mesh, batch, parameters and memory of a recipe; read no data and no weights, need no GPU.

    example: launcher plan recipes/llama3.1-8b-fsdp2.yaml cluster.nodes=4
    """
    from launcher.plan import make_plan
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    plan = make_plan(loaded)
    if as_json:
        click.echo(json.dumps(plan.to_dict(), indent=2))
        return
    lines = [("plan", loaded.run.name or ""), *rows(loaded, plan)]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        click.echo(f"{name:<{width}}  {text}")


def rows(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    """What to tell about a plan: a name and a sentence's worth of figures, a line each."""
    yield "ranks", f"{plan.world_size} = {plan.nodes} x {plan.nproc_per_node} (nodes x ranks on each)"
    copies = f"{plan.mesh.replicate} {'copies' if plan.mesh.replicate > 1 else 'copy'} of the model state"
    yield "strategy", f"{recipe.strategy.kind}: {copies}, each on {plan.mesh.shard} rank{'s' * (plan.mesh.shard > 1)}"
    parts = f"{plan.world_size} ranks x {plan.micro_batch_size} a forward x {plan.accumulation_steps} forwards"
    yield "global batch", f"{plan.global_batch_size:,} rows = {parts}"
    yield "tokens a step", f"{plan.tokens_per_step:,} at most ({plan.seq_len:,} a row)"
    yield (
        "length",
        f"{plan.max_steps:,} steps" if plan.max_steps else f"{plan.epochs:g} epochs, steps known when prepared",
    )
    yield "precision", f"{plan.precision}, weights kept in {recipe.model.dtype}"
    if plan.parameters is None or plan.memory is None:
        yield "parameters", f"unknown: {plan.parameters_note}"
        return
    yield "parameters", f"{plan.parameters.total:,} ({plan.parameters.embedding:,} of the input embedding)"
    yield "compute", f"{plan.parameters.flops_per_token:.4g} FLOPs a token, forward and backward"
    place = "host memory" if recipe.strategy.offload.params == "cpu" else "each rank"
    memory = plan.memory
    split = f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, moments {size(memory.moments)}"
    yield "model state", f"{size(memory.total)} on {place}: {split}; activations come on top"


def size(count: int) -> str:
    """Bytes for people: `3.74 GiB`."""
    unit, scale = ("GiB", 30) if count >= 1 << 30 else ("MiB", 20)
    return f"{count / (1 << scale):.3g} {unit}"
