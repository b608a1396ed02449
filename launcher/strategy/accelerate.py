"""Hugging Face Accelerate's configuration file for a plan: what `accelerate launch --config_file` reads, and no more.

Written for Accelerate 1.15. Only keys that it reads are here: `rdzv_backend`, `same_network` and unknown nested keys
would be dropped without a word (a test changes each key and looks for the difference). Ranks always start through
torchrun's agent, also without a GPU, where `MULTI_CPU` would start one process.
"""

from __future__ import annotations

from typing import Any

from launcher.plan import Plan
from launcher.plan.chosen import planned_precision
from launcher.recipe.schema import Recipe
from launcher.strategy.explained import Explained, nested

DEEPSPEED_FILE = "deepspeed.json"  # beside accelerate.yaml


def config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The file as a plain dict."""
    return nested(explain(recipe, plan))


def explain(recipe: Recipe, plan: Plan) -> Explained:
    """Each key of the file, and why it has its value."""
    kind = recipe.strategy.kind
    if kind == "ddp":
        found = _start("MULTI_GPU", "ddp; one process a rank, on a CPU too") | _precision(recipe) | _compile(recipe)
    elif kind == "fsdp2":
        found = _start("FSDP", "fsdp2") | _precision(recipe) | _compile(recipe) | _fsdp(recipe) | _mesh(plan)
    else:
        found = _start("DEEPSPEED", kind) | _deepspeed(recipe, plan)
    return found | _machines(plan)


def mixed_precision(recipe: Recipe) -> tuple[str, str]:
    """Accelerate's word for the arithmetic beside fp32 weights; weights in bf16 need none."""
    precision, why = planned_precision(recipe)
    if recipe.model.dtype == "bf16":
        return "no", "model.dtype: weights and arithmetic are bf16 without it"
    return ("no", why) if precision == "fp32" else (precision, why)


def _start(kind: str, why: str) -> Explained:
    return {"compute_environment": ("LOCAL_MACHINE", "no cloud service"), "distributed_type": (kind, why)}


def _machines(plan: Plan) -> Explained:
    found: Explained = {
        "num_machines": (plan.nodes, "cluster.nodes"),
        "num_processes": (plan.world_size, f"cluster.nodes x cluster.nproc_per_node = {plan.world_size} ranks in all"),
    }
    if plan.nodes == 1:
        found["main_process_port"] = (0, "a free port, so that two runs can share a machine")
    else:
        found["machine_rank"] = (0, "node 0; others are told --machine_rank on the command line")
    return found


def _precision(recipe: Recipe) -> Explained:
    return {"mixed_precision": mixed_precision(recipe)}


def _compile(recipe: Recipe) -> Explained:
    if not recipe.model.compile:
        return {}
    return {
        "dynamo_config.dynamo_backend": ("INDUCTOR", "model.compile"),
        "dynamo_config.dynamo_use_regional_compilation": (True, "each decoder block, not the whole model"),
    }


def _fsdp(recipe: Recipe) -> Explained:
    reshard, recompute = recipe.strategy.reshard_after_forward, recipe.model.gradient_checkpointing
    grouped = not isinstance(reshard, bool)
    found: Explained = {
        "fsdp_config.fsdp_version": (2, "fully_shard"),
        "fsdp_config.fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "one unit a block, as the model names them"),
        "fsdp_config.fsdp_reshard_after_forward": (
            bool(reshard), "accelerate has no groups; the trainer reshards to them" if grouped else "strategy"
        ),
        "fsdp_config.fsdp_offload_params": (recipe.strategy.offload.params == "cpu", "strategy.offload.params"),
        "fsdp_config.fsdp_state_dict_type": ("SHARDED_STATE_DICT", "no rank gathers the whole model"),
        "fsdp_config.fsdp_cpu_ram_efficient_loading": (True, "one process reads the weights"),
        "fsdp_config.fsdp_activation_checkpointing": (recompute in ("full", "offload"), _recompute(recompute)),
    }  # fmt: skip
    if recompute == "offload":
        why = "model.gradient_checkpointing: block inputs wait in host memory"
        found["fsdp_config.fsdp_activation_checkpointing_offload"] = (True, why)
    return found


def _recompute(kind: str) -> str:
    if kind == "selective":
        return "accelerate recomputes whole blocks or nothing; the trainer recomputes selectively"
    return f"model.gradient_checkpointing = {kind}"


def _mesh(plan: Plan) -> Explained:
    """HSDP; without copies, accelerate shards over all ranks."""
    if plan.mesh.replicate == 1:
        return {}
    return {
        "parallelism_config.parallelism_config_dp_replicate_size": (plan.mesh.replicate, "copies of the shards"),
        "parallelism_config.parallelism_config_dp_shard_size": (plan.mesh.shard, "ranks that share one copy"),
    }


def _deepspeed(recipe: Recipe, plan: Plan) -> Explained:
    """The file says all; keys beside it, mixed_precision too, are refused by accelerate or ignored."""
    found: Explained = {
        "deepspeed_config.deepspeed_config_file": (DEEPSPEED_FILE, "read whole; from the folder where you start"),
        "deepspeed_config.zero3_init_flag": (
            recipe.strategy.kind == "zero3", "weights are sharded while the model is built, if they are sharded at all"
        ),
    }  # fmt: skip
    if plan.nodes > 1:
        why = "torchrun's agent on each node, no ssh between them"
        found["deepspeed_config.deepspeed_multinode_launcher"] = ("standard", why)
    return found
