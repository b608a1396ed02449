"""What a rank sends to others in one optimizer step, and how many tokens of computing hide it.

Collectives are counted as rings: of n ranks each sends (n - 1) / n of what an all-gather or a reduce-scatter moves, and
an all-reduce is both. Metrics, norms and checkpoints are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.plan.batch import accumulation_steps
from launcher.plan.memory import Job, flat_groups, rows_share, zero_size
from launcher.plan.mesh import Mesh
from launcher.plan.parameters import Config, Weight, count
from launcher.recipe.schema import Recipe

FLOPS_PER_S = 495e12  # what a rank computes: half of an H100's bf16 peak
LINKS = {"nvlink": 400e9, "network": 50e9}  # bytes/s of a rank: NVLink inside a node, 400 Gb/s across nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, and when they cost no time.

    gather: weights, to those that share a copy of the model
    reduce: gradients, to those that share a copy
    across: gradients, to the same shard of the other copies
    total: all three
    hidden_at_nvlink, hidden_at_network: tokens that a rank must compute in a step for `total` to travel meanwhile, at
        400 and at 50 GB/s, computing 495 TFLOP/s
    tokens_per_rank: that it does compute, every row full
    """

    gather: int
    reduce: int
    across: int
    total: int
    hidden_at_nvlink: int
    hidden_at_network: int
    tokens_per_rank: int


def traffic(recipe: Recipe, config: Config, found: Sequence[Weight], mesh: Mesh) -> Traffic:
    """Traffic of a run whose weights (adapters among them) are `found`."""
    job = Job.of(recipe, config, found, mesh)
    train = recipe.train
    steps = accumulation_steps(
        global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size, world_size=job.world
    )
    kind = recipe.strategy.kind
    build = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}.get(kind, _zero12)
    gather, reduce, across = (round(b) for b in build(job, steps))
    total = gather + reduce + across
    flops = count(config, found, recipe.data.seq_len).flops_per_token
    nvlink, network = (math.ceil(total / speed * FLOPS_PER_S / flops) for speed in LINKS.values())
    return Traffic(
        gather=gather, reduce=reduce, across=across, total=total, hidden_at_nvlink=nvlink, hidden_at_network=network,
        tokens_per_rank=steps * job.tokens,
    )  # fmt: skip


def _ddp(job: Job, steps: int) -> tuple[float, float, float]:
    """Gradients are averaged once a step; those of half precision travel in fp32 too."""
    learnt = sum(w.elements for w in job.found if w.trained) * 4
    return 0, 0, 2 * learnt * (job.world - 1) / job.world


def _fsdp2(job: Job, steps: int) -> tuple[float, float, float]:
    """Weights travel in the type of the arithmetic, gradients in fp32."""
    n, copies, c, again = job.mesh.shard, job.mesh.replicate, job.how.compute, job.recipe.strategy.reshard_after_forward
    root = sum(rows_share(w, n) for w in job.found if not w.blocks) * c
    blocks = sum(rows_share(w, n) for w in job.found if w.blocks) * c
    learnt = sum(rows_share(w, n) for w in job.found if w.trained) * 4
    gather: float = (
        (root + blocks) * (n - 1) * (1 if again is False else steps)
    )  # kept whole, they are gathered once a step
    if again is True:
        gather += blocks * (n - 1) * steps
    elif again is not False:  # the backward pass gathers in the smaller group, from its larger shards
        gather += blocks * n / again * (again - 1) * steps
    reduce = learnt * (n - 1) * (1 if again is False else steps)
    return gather, reduce, 2 * learnt * (copies - 1) / copies


def _zero12(job: Job, steps: int) -> tuple[float, float, float]:
    """Gradients in fp32, by all-reduce (DeepSpeed's use_multi_rank_bucket_allreduce): ZeRO-1 once a step, ZeRO-2 after
    each forward pass. The updated weights are gathered once."""
    flat, n, c = sum(flat_groups(job.found, job.world)), job.world, job.how.compute
    learnt = sum(w.elements for w in job.found if w.trained) * 4
    times = steps if job.recipe.strategy.kind == "zero2" else 1
    return flat * c * (n - 1) / n, 2 * learnt * (n - 1) / n * times, 0


def _zero3(job: Job, steps: int) -> tuple[float, float, float]:
    """As fsdp2, but small weights stay whole and are gathered once a step; ZeRO++ makes weights 8 and gradients 4 bit,
    and gathers for the backward pass among the ranks that hold a second copy."""
    n, c, zero = job.world, job.how.compute, job.recipe.strategy.zero
    small = zero_size(job, "param_persistence_threshold")
    large = sum(-(-math.prod(w.shape) // n) * w.times for w in job.found if math.prod(w.shape) > small)
    kept = sum(-(-math.prod(w.shape) // n) * w.times for w in job.found if math.prod(w.shape) <= small)
    learnt = sum(-(-math.prod(w.shape) // n) * w.times for w in job.found if w.trained)
    width = 1 if zero.quantized_weights else c
    gather: float = large * (n - 1) * width * steps + kept * (n - 1) * c
    group = zero.hpz_partition_size
    gather += (large * (n - 1) if group == 1 else large * n / group * (group - 1)) * width * steps
    return gather, learnt * (n - 1) * (0.5 if zero.quantized_gradients else 4) * steps, 0
