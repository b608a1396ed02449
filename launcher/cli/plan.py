"""`launcher plan`: prints what follows from a recipe by arithmetic, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from launcher.plan import Memory, Parameters, Plan, Traffic
    from launcher.recipe.schema import Recipe


@click.command(short_help="Print what follows from a recipe by arithmetic.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one object (docs/json.md).")
def command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print mesh, batch, parameters, memory and traffic of a recipe; read no data and no weights, need no GPU.

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
    from launcher.plan.elastic import plans

    yield "ranks", f"{plan.world_size} = {plan.nodes} x {plan.nproc_per_node} (nodes x ranks on each)"
    copies = f"{plan.mesh.replicate} {'copies' if plan.mesh.replicate > 1 else 'copy'} of the model state"
    yield "strategy", f"{recipe.strategy.kind}: {copies}, each on {_counted(plan.mesh.shard, 'rank')}"
    forwards = _counted(plan.accumulation_steps, "forward")
    parts = f"{_counted(plan.world_size, 'rank')} x {plan.micro_batch_size} a forward x {forwards}"
    yield "global batch", f"{_counted(plan.global_batch_size, 'row')} = {parts}"
    if recipe.cluster.min_nodes is not None:
        yield "elastic", "; ".join(_with_nodes(fewer) for fewer in plans(recipe))
    yield "tokens a step", f"{plan.tokens_per_step:,} at most ({plan.seq_len:,} a row)"
    yield "length", _counted(plan.max_steps, "step") if plan.max_steps else _epochs(plan.epochs)
    yield "precision", f"{plan.precision}, weights kept in {recipe.model.dtype}"
    if plan.parameters is None or plan.memory is None or plan.traffic is None:
        yield "parameters", f"unknown: {plan.parameters_note}"
        yield "memory", "unchecked: it follows from the parameters"
        return
    yield from _model(recipe, plan.parameters)
    yield from _memory(recipe, plan.memory)
    yield from _host(plan.memory)
    yield from _traffic(recipe, plan.traffic)
    yield from _checkpoints(recipe, plan)
    if recipe.strategy.deepspeed:
        yield "not counted", "what strategy.deepspeed lays over the configuration"


def _with_nodes(plan: Plan) -> str:
    from launcher.plan.elastic import empty

    spare = f", {_counted(slots, 'slot')} of weight 0" if (slots := empty(plan)) else ""
    need = f", {size(plan.memory.total)}" if plan.memory else ""
    return f"{_counted(plan.nodes, 'node')}: {_counted(plan.accumulation_steps, 'forward')} a rank{spare}{need}"


def _model(recipe: Recipe, model: Parameters) -> Iterator[tuple[str, str]]:
    learnt = "" if model.trainable == model.total else f", {model.trainable:,} trained ({recipe.adapter.kind})"
    yield "parameters", f"{model.total:,} ({model.embedding:,} of the input embedding){learnt}"
    again = model.recompute_flops_per_token
    more = f", and {again:.4g} recomputed" if again else ""
    yield "compute", f"{model.flops_per_token:.4g} FLOPs a token, forward and backward{more}"


def _memory(recipe: Recipe, memory: Memory) -> Iterator[tuple[str, str]]:
    yield "memory", f"{size(memory.total)} on the fullest rank: {_against(recipe, memory)}"
    told = {
        "weights": "exact", "masters": "exact; fp32 copies that are updated", "gradients": "exact", "moments": "exact",
        "gathered": "weights whole for the moment, or copies in the type of the arithmetic",
        "buffers": "gradients on their way", "activations": f"gradient_checkpointing: {_mode(recipe)}",
        "logits": "the loss over the vocabulary", "update": "the optimizer step beyond that",
        "context": "an allowance for CUDA and its libraries",
    }  # fmt: skip
    for part, text in told.items():
        if value := getattr(memory, part):
            yield f"  {part}", f"{size(value):>9}  {text}"


def _mode(recipe: Recipe) -> str:
    return f"{recipe.model.gradient_checkpointing}, {recipe.train.micro_batch_size} x {recipe.data.seq_len:,} tokens"


def _against(recipe: Recipe, memory: Memory) -> str:
    limit = recipe.cluster.gpu_memory_gib
    if limit is None:
        return "unchecked: cluster.gpu_memory_gib is null"
    left = int(limit * (1 << 30)) - memory.total
    return f"{size(left)} of {limit:g} GiB left" if left >= 0 else f"{size(-left)} more than {limit:g} GiB"


def _host(memory: Memory) -> Iterator[tuple[str, str]]:
    told = {
        "state": "offloaded model state", "nvme": "on the node's disk instead",
        "reader": "the whole model, while the first rank reads it", "checkpoint": "copies that async_save writes from",
        "activations": "inputs of the blocks",
    }  # fmt: skip
    parts = [f"{size(value)} {text}" for name, text in told.items() if (value := getattr(memory.host, name))]
    yield "host memory", "first node: " + ", ".join(parts)


def _traffic(recipe: Recipe, traffic: Traffic) -> Iterator[tuple[str, str]]:
    if not traffic.total:
        yield "traffic", "none: one rank"
        return
    parts = [f"{size(traffic.gather)} of weights", f"{size(traffic.reduce)} of gradients"]
    parts.append(f"{size(traffic.across)} of gradients between copies")
    said = ", ".join(part for part in parts if not part.startswith("0 "))
    yield "traffic", f"{size(traffic.total)} sent by each rank in a step: {said}"
    if recipe.cluster.accelerator == "cpu":  # whose speed and links are not those of the figures below
        return
    need = f"{traffic.hidden_at_nvlink:,} tokens of a rank at 400 GB/s, {traffic.hidden_at_network:,} at 50 GB/s"
    yield "  hidden", f"behind {need} (495 TFLOP/s); a step has {traffic.tokens_per_rank:,}"


def _checkpoints(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    """What one costs by estimate, and how often it pays."""
    from launcher.plan.disk import checkpoint_bytes, size_text
    from launcher.plan.saving import best_interval, estimated_cost, lost_s, stop_lead_s, useful_share

    keys = recipe.checkpoint
    cost = estimated_cost(recipe, plan)
    assert plan.parameters is not None
    assert cost is not None
    whole = size_text(checkpoint_bytes(recipe, plan.parameters))
    still = f"training stands still for {_duration(cost.blocked_s)}"
    yield "checkpoint", f"{whole}: durable after {_duration(cost.durable_s)} (1 GB/s a node), {still}"
    hours = 24.0 if keys.mttf_hours is None else keys.mttf_hours
    best = best_interval(cost, mttf_s=3600 * hours, lead_s=stop_lead_s(recipe.cluster))
    lost = f"a failure then costs {_duration(lost_s(best.seconds, cost))} of work"
    share = useful_share(best.seconds, cost, mttf_s=3600 * hours)
    text = f"every {_duration(best.seconds)} with a failure every {hours:g} h: {best.reason}; {lost}, "
    text += f"{share:.1%} of the time is training that counts"
    advice = "" if keys.every_steps == "auto" else f" (checkpoint.every_steps=auto checkpoint.mttf_hours={hours:g})"
    yield "  interval", f"{'is' if keys.every_steps == 'auto' else 'pays'} {text}{advice}"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 60:.2g} min" if seconds >= 90 else f"{seconds:.2g} s"


def _epochs(count: float | None) -> str:
    return f"{count:g} epoch{'s' * (count != 1)}, steps known when prepared"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes for people: `3.74 GiB`."""
    unit, scale = ("GiB", 30) if count >= 1 << 30 else ("MiB", 20)
    return f"{count / (1 << scale):.3g} {unit}"
