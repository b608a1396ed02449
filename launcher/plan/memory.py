"""What the fullest rank and its node must hold, in bytes: model state exactly, the rest by formulas.

Nothing here is measured. Model state is what the engines allocate, padding included; activations and the loss follow
`launcher.plan.activations`; buffers and the CUDA context are bounds. A plan that fits by a hair may still not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.plan import activations
from launcher.plan.activations import Arithmetic
from launcher.plan.chosen import planned_precision, zero_sizes
from launcher.plan.mesh import Mesh
from launcher.plan.parameters import Config, Sizes, Weight, is_tied, sizes
from launcher.recipe.schema import Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 1 << 30
CONTEXT = GIB  # CUDA's context, cuBLAS's and the attention kernels' workspaces, and what the allocator cannot use
CONTEXT_OF_LINKS = GIB // 2  # NCCL's buffers, where there is more than one rank
DDP_BUCKETS = 2 * 25 * 2**20 * 2  # two of torch's 25 MiB buckets of half-precision gradients, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of host memory on the fullest node, the first; beside them stand Python and the data.

    state: offloaded weights, gradients and moments of its ranks
    nvme: what of the state lies on the node's disk instead
    reader: the whole model, once, while the first rank reads it; freed before training
    checkpoint: copies that checkpoint.async_save writes from
    activations: inputs of the blocks (model.gradient_checkpointing: offload)
    """

    state: int = 0
    nvme: int = 0
    reader: int = 0
    checkpoint: int = 0
    activations: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank; the first four are exact, `total` is the sum of all but the host's.

    weights: as the forward pass reads them, sharded where they are
    masters: fp32 copies that are updated in their place (ZeRO)
    gradients: between micro-batches
    moments: both of AdamW
    gathered: weights that are whole on the rank for the moment, or copies of them in the type of the arithmetic
    buffers: gradients on their way between ranks
    activations: what the forward pass keeps of a micro-batch
    logits: the loss over the vocabulary
    update: what the optimizer step needs beyond what the backward pass has left free
    context: an allowance for CUDA, its libraries and the allocator
    """

    weights: int
    masters: int
    gradients: int
    moments: int
    gathered: int
    buffers: int
    activations: int
    logits: int
    update: int
    context: int
    total: int
    host: HostMemory

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.gradients + self.moments


def estimate(recipe: Recipe, config: Config, found: Sequence[Weight], mesh: Mesh) -> Memory:
    """Memory of a run whose weights (adapters among them) are `found`."""
    job = Job.of(recipe, config, found, mesh)
    build = {"ddp": _ddp, "fsdp2": _fsdp2}.get(recipe.strategy.kind, _zero)
    share = build(job)
    tokens, how = job.tokens, job.how
    size, model = job.size, recipe.model
    per_block = activations.adapter_bytes(found, how, dropout=recipe.adapter.dropout, layers=size.layers)
    kept = activations.kept_bytes(
        size, how, model.gradient_checkpointing, tokens=tokens, seq_len=recipe.data.seq_len, more=per_block
    )
    head = any(w.trained for w in found if (w.embedding if is_tied(config) else not w.blocks and w.layer))
    softcap = bool(config.get("final_logit_softcapping", config.get("model_type") == "gemma2"))
    logits = activations.loss_bytes(size, how, tokens=tokens, head_trained=head, softcap=softcap)
    parts = {
        "weights": share.weights, "masters": share.masters, "gradients": share.gradients, "moments": share.moments,
        "gathered": share.gathered, "buffers": share.buffers, "activations": kept, "logits": logits,
        "update": max(0, share.update - share.gathered - kept - logits),
        "context": (CONTEXT + CONTEXT_OF_LINKS * (job.world > 1)) * (how.device == "cuda"),
    }  # fmt: skip
    return Memory(**parts, total=sum(parts.values()), host=_host(job, share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the formulas of every strategy read.

    world: ranks
    weight: bytes of a number of the model's weights, as the recipe keeps them
    tokens: of one micro-batch on one rank
    """

    recipe: Recipe
    found: Sequence[Weight]
    mesh: Mesh
    world: int
    weight: int
    size: Sizes
    how: Arithmetic
    tokens: int
    tied: bool

    @staticmethod
    def of(recipe: Recipe, config: Config, found: Sequence[Weight], mesh: Mesh) -> Job:
        """Of a recipe: types by its strategy."""
        weight, compute = BYTES[recipe.model.dtype], BYTES[planned_precision(recipe)[0]]
        learnt = 4 if any(w.adapter for w in found) else weight
        ddp = recipe.strategy.kind == "ddp"
        return Job(
            recipe=recipe, found=found, mesh=mesh, world=mesh.replicate * mesh.shard, weight=weight,
            size=sizes(config), tokens=recipe.train.micro_batch_size * recipe.data.seq_len, tied=is_tied(config),
            how=Arithmetic(
                compute=compute, weight=weight if ddp else compute, autocast=ddp and learnt != compute,
                attention=recipe.model.attention, liger=recipe.model.liger is True,
                device="cpu" if recipe.cluster.accelerator == "cpu" else "cuda",
            ),
        )  # fmt: skip

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return self.recipe.train.global_batch_size > self.recipe.train.micro_batch_size * self.world

    def kept(self, w: Weight) -> int:
        """Bytes of a number of this weight where DDP and FSDP2 keep it."""
        return 4 if w.adapter else self.weight

    @property
    def block(self) -> list[Weight]:
        """The weights of the largest block, each `times` it holds it."""
        sums: dict[int, int] = {}
        for w in self.found:
            for i in w.blocks:
                sums[i] = sums.get(i, 0) + w.elements // len(w.blocks)
        largest = max(sums, key=lambda i: sums[i], default=None)
        return [_one(w) for w in self.found if largest in w.blocks]

    @property
    def root(self) -> list[Weight]:
        """The weights outside the blocks."""
        return [w for w in self.found if not w.blocks]


def _one(w: Weight) -> Weight:
    return Weight(w.shape, w.times // len(w.blocks), trained=w.trained, adapter=w.adapter, layer=w.layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What a strategy puts on the fullest rank; `host` and `nvme` are what lies there instead, of this rank alone."""

    weights: int = 0
    masters: int = 0
    gradients: int = 0
    moments: int = 0
    gathered: int = 0
    buffers: int = 0
    update: int = 0
    host: int = 0
    nvme: int = 0


def elements(found: Iterable[Weight], *, trained: bool | None = None) -> int:
    """Numbers in these weights, or in those of them that learn."""
    return sum(w.elements for w in found if trained is None or w.trained == trained)


def rows_share(w: Weight, ranks: int) -> int:
    """Numbers of a weight on the fullest of the ranks that `fully_shard` deals its rows to."""
    return -(-w.shape[0] // ranks) * math.prod(w.shape[1:]) * w.times


def _ddp(job: Job) -> _Share:
    weights = sum(w.elements * job.kept(w) for w in job.found)
    learnt = sum(w.elements * job.kept(w) for w in job.found if w.trained)
    half = any(w.trained and job.kept(w) == 2 for w in job.found)
    cast = [w for w in job.found if len(w.shape) > 1 and not (w.embedding and not job.tied) and job.kept(w) == 4]
    return _Share(
        weights=weights, gradients=learnt, moments=2 * learnt,
        gathered=elements(cast) * job.how.compute if job.how.autocast else 0,
        buffers=DDP_BUCKETS if half else 0,
    )  # fmt: skip


def _fsdp2(job: Job) -> _Share:
    shard, strategy, c = job.mesh.shard, job.recipe.strategy, job.how.compute
    weights = sum(rows_share(w, shard) * job.kept(w) for w in job.found)
    learnt = sum(rows_share(w, shard) * job.kept(w) for w in job.found if w.trained)
    block, root, again = elements(job.block), elements(job.root), strategy.reshard_after_forward
    ahead = 1 + (strategy.prefetch or 1)
    whole = (root + ahead * block) * c
    if again is False:
        whole = elements(job.found) * c
    elif again is not True:  # between forward and backward, shards of the smaller group stay
        whole += sum(rows_share(w, again) for w in job.found if w.blocks) * c
    on_way = elements(job.block, trained=True) * (c + 4)  # a block's gradient, and its fp32 copy that is reduced
    if again is False and job.accumulates:
        on_way += elements(job.found, trained=True) * 4
    root_on_way = (elements(job.root, trained=True)) * (c + 4)
    state = {"weights": weights, "gradients": learnt, "moments": 2 * learnt}
    if strategy.offload.params == "cpu":
        return _Share(gathered=whole, buffers=on_way, update=root_on_way, host=sum(state.values()))
    return _Share(**state, gathered=whole, buffers=on_way, update=root_on_way)


def _zero(job: Job) -> _Share:
    return _zero3(job) if job.recipe.strategy.kind == "zero3" else _zero12(job)


def flat_groups(found: Sequence[Weight], ranks: int) -> list[int]:
    """Numbers in each flat group of ZeRO-1 and 2: matrices, and the rest, each padded to 2 x ranks."""
    learnt = [w for w in found if w.trained]
    sums = (elements(w for w in learnt if len(w.shape) > 1), elements(w for w in learnt if len(w.shape) < 2))
    return [-(-count // (2 * ranks)) * 2 * ranks for count in sums if count]


def _master(job: Job) -> int:
    """Bytes of a number of DeepSpeed's masters, moments and summed gradients: bf16 where the recipe keeps all in it."""
    return 2 if job.weight == 2 else 4


def _zero12(job: Job) -> _Share:
    """Weights whole on each rank, in the type of the arithmetic; masters, moments and summed gradients in flat parts.

    ZeRO-1 keeps whole gradients from one micro-batch of a step to the next; in bf16 it is another class of DeepSpeed's
    (BF16_Optimizer), which sums whole gradients in fp32 beside those of the arithmetic.
    """
    recipe, c, master = job.recipe, job.how.compute, _master(job)
    flat, learnt = sum(flat_groups(job.found, job.world)), elements(job.found, trained=True)
    part, wide = flat // job.world, c == 2 and master == 4
    offloaded = recipe.strategy.offload.optimizer != "none"
    first = recipe.strategy.kind == "zero1"
    weights = (flat + elements(job.found, trained=False)) * c
    largest = max((math.prod(w.shape) for w in job.found if w.trained), default=0)
    buffers = zero_size(job, "reduce_bucket_size") * 4 * 2 + largest * c * (1 + offloaded)
    if first and wide and planned_precision(recipe)[0] == "bf16" and not offloaded:
        return _Share(
            weights=weights, masters=part * master, gradients=flat * master + learnt * c, moments=2 * part * master,
            buffers=buffers,
        )  # fmt: skip
    if first and job.accumulates:
        buffers += learnt * (master if wide else c)
    if offloaded:
        return _Share(
            weights=weights, buffers=buffers, gradients=part * master * wide,
            host=part * (master * 4 + c),  # master, its gradient, two moments; the weight as the forward pass reads it
        )  # fmt: skip
    return _Share(
        weights=weights, masters=part * master, gradients=part * master, moments=2 * part * master, buffers=buffers,
        update=part * master,
    )  # fmt: skip


def _zero3(job: Job) -> _Share:
    """Everything in parts, each weight padded to the ranks; also fp32 weights have masters (DeepSpeed 0.19)."""
    recipe, c, master, n = job.recipe, job.how.compute, _master(job), job.world
    zero, offload = recipe.strategy.zero, recipe.strategy.offload
    part = sum(-(-math.prod(w.shape) // n) * w.times for w in job.found if w.trained)
    frozen = sum(-(-math.prod(w.shape) // n) * w.times for w in job.found if not w.trained)
    small = sum(w.elements for w in job.found if math.prod(w.shape) <= zero_size(job, "param_persistence_threshold"))
    live = min(elements(job.found) - small, _live(job))
    gathered = (small + live) * c
    if zero.hpz_partition_size > 1:
        gathered += sum(-(-math.prod(w.shape) // zero.hpz_partition_size) * w.times for w in job.found) * c
    largest = max((math.prod(w.shape) for w in job.found if w.trained), default=0)
    buffers = zero_size(job, "reduce_bucket_size") * 4 + largest * (c + 4)
    weights, gradients, moments = (part + frozen) * c, part * master, 2 * part * master
    masters = part * master
    on_host = {"none": 0, "cpu": masters + moments + 2 * gradients, "nvme": 2 * gradients}[offload.optimizer]
    on_disk = (masters + moments) * (offload.optimizer == "nvme") + weights * (offload.params == "nvme")
    here = offload.optimizer == "none"
    return _Share(
        weights=weights * (offload.params == "none"), masters=masters * here, gradients=gradients * here,
        moments=moments * here, gathered=gathered, buffers=buffers, update=gradients * here,
        host=on_host + weights * (offload.params == "cpu"), nvme=on_disk,
    )  # fmt: skip


def _live(job: Job) -> int:
    """Numbers of the other weights that ZeRO-3 may hold whole: its limit, or what its largest weight needs."""
    needed = zero_size(job, "prefetch_bucket_size") + max((math.prod(w.shape) for w in job.found), default=0)
    return max(needed, zero_size(job, "max_live_parameters"))


def zero_size(job: Job, key: str) -> int:
    """Elements of `strategy.zero.<key>`, as given or chosen."""
    return zero_sizes(job.recipe, job.size.hidden)[key][0]


def _host(job: Job, share: _Share) -> HostMemory:
    recipe, ranks = job.recipe, job.recipe.cluster.nproc_per_node
    zero = recipe.strategy.kind.startswith("zero")
    stored = 0
    for w in job.found:
        if w.trained:
            stored += w.elements * 3 * (_master(job) if zero else job.kept(w))
        elif recipe.checkpoint.store_frozen:
            stored += w.elements * (job.how.compute if zero else job.kept(w))
    waiting = recipe.model.gradient_checkpointing == "offload"
    return HostMemory(
        state=share.host * ranks, nvme=share.nvme * ranks, reader=sum(w.elements * job.kept(w) for w in job.found),
        checkpoint=-(-stored // job.world) * ranks if recipe.checkpoint.async_save else 0,
        activations=activations.host_bytes(job.size, job.how, job.tokens) * ranks if waiting else 0,
    )  # fmt: skip
