"""Model state byte for byte against real engines on real ranks; the rest of a plan's memory against figures by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.plan import Memory, make_plan
from launcher.plan.memory import GIB, flat_groups, rows_share
from launcher.plan.mesh import Mesh
from launcher.plan.parameters import Weight
from launcher.recipe.schema import Adapter, Cluster, Data, Model, Recipe, Source, Strategy, Train
from tests.ranks import run_ranks

ODD = {
    "model_type": "qwen3", "vocab_size": 97, "hidden_size": 36, "intermediate_size": 61, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 256,
}  # fmt: skip
TIED = {**ODD, "tie_word_embeddings": True}
LORA = {"adapter__kind": "lora", "adapter__rank": 5, "adapter__targets": ["q_proj", "layers.1.mlp.down_proj"]}
BF16, ALL_BF16 = {"train__precision": "bf16"}, {"model__dtype": "bf16"}
TWO_FORWARDS = {"train__global_batch_size": 12}
CPU = {"strategy__offload__params": "cpu", "strategy__offload__optimizer": "cpu"}
CASES: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (3, "ddp", ODD, {}),
    (3, "ddp", TIED, {**LORA, **BF16}),
    (3, "ddp", TIED, {**ALL_BF16, **TWO_FORWARDS}),
    (3, "fsdp2", ODD, BF16),
    (3, "fsdp2", TIED, {**LORA, **ALL_BF16}),
    (3, "fsdp2", ODD, CPU),
    (3, "zero1", ODD, TWO_FORWARDS),
    (3, "zero1", ODD, BF16),
    (3, "zero1", TIED, LORA),
    (3, "zero2", ODD, ALL_BF16),
    (3, "zero2", TIED, {**LORA, **BF16}),
    (3, "zero2", ODD, {"strategy__offload__optimizer": "cpu", **BF16}),
    (3, "zero3", ODD, {}),
    (3, "zero3", TIED, {**LORA, **BF16}),
    (3, "zero3", ODD, {**CPU, **BF16}),
    (4, "fsdp2", ODD, {"strategy__shard": 2}),
    (4, "fsdp2", TIED, LORA),
    (1, "fsdp2", ODD, BF16),
    (1, "ddp", ODD, {}),
]


def planned(world_size: int, kind: str, config: dict[str, Any], changes: dict[str, Any]) -> tuple[Recipe, Memory]:
    """The recipe of a case and its memory."""
    from tests.trainer.make import make_recipe

    recipe = make_recipe(kind, config=config, **changes)
    recipe.cluster = Cluster(nproc_per_node=world_size, accelerator="cpu")
    memory = make_plan(recipe).memory
    assert memory is not None
    return recipe, memory


def held(rank: int, world_size: int, store: str, cases: list[Any]) -> list[dict[str, int]]:
    """Bytes of model state that this rank holds in each case: after the backward pass, and after an update."""
    from tests.trainer import make

    found = []
    for kind, config, changes in cases:
        recipe = make.make_recipe(kind, config=config, **changes)
        engine, backend = make.make_engine(recipe, rank=rank)
        data = make.batches(Path(store), recipe, rank=rank, world_size=world_size).step(0)
        make.forward_backward(engine, data, world_size=world_size, backend=backend)
        state = _zero_state(engine) if kind.startswith("zero") else _torch_state(engine)
        engine.clip_and_step(1e-3, 1.0)
        engine.ensure_state()
        state["moments"] = _bytes(s[k] for s in engine.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
        found.append(state)
    return found


def _bytes(tensors: Any) -> int:
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None)
    return sum(t.numel() * t.element_size() for t in local)


def _torch_state(engine: Any) -> dict[str, int]:
    parameters = list(engine.module.parameters())
    return {"weights": _bytes(parameters), "masters": 0, "gradients": _bytes(p.grad for p in parameters)}


def _zero_state(engine: Any) -> dict[str, int]:
    zero, parameters, flats = engine.zero, list(engine.module.parameters()), engine.flats()
    if engine.stage == 3:
        weights = [p.ds_tensor for p in parameters]
        gradients = [zero.grad_partitions_flat_buffer]
    else:
        groups = getattr(zero, "bit16_groups_flat", None) or zero.bf16_groups_flat
        weights = [*groups, *(p for p in parameters if not p.requires_grad)]
        summed = [t for group in getattr(zero, "averaged_gradients", {}).values() for t in group]
        gradients = [*summed, *getattr(zero, "fp32_groups_gradients_flat", []), *(p.grad for p in parameters)]
    places = {t.untyped_storage().data_ptr() for t in weights}
    masters = [flat for flat in flats if flat.untyped_storage().data_ptr() not in places]
    return {
        "weights": _bytes(weights), "masters": _bytes(masters), "gradients": _bytes(gradients),
        "update": _bytes(flat.grad for flat in flats),
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    from tests.trainer.make import documents_store

    return documents_store(tmp_path_factory.mktemp("store"))


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_planned_model_state_is_byte_for_byte_what_the_fullest_rank_holds(world_size, store):
    if any(kind.startswith("zero") for world, kind, _, _ in CASES if world == world_size):
        pytest.importorskip("deepspeed")
    cases = [case[1:] for case in CASES if case[0] == world_size]
    ranks = run_ranks(held, world_size, str(store), cases)
    for i, (kind, config, changes) in enumerate(cases):
        recipe, memory = planned(world_size, kind, config, changes)
        real = {part: max(rank[i][part] for rank in ranks) for part in ("weights", "masters", "gradients", "moments")}
        if recipe.strategy.offload.optimizer == "none":
            told = {part: getattr(memory, part) for part in real}
            assert told == real, (kind, config is TIED, changes)
        elif kind == "fsdp2":
            assert (memory.state, memory.host.state) == (0, sum(real.values()) * world_size)
        else:
            update = max(rank[i]["update"] for rank in ranks)
            host = real["masters"] + real["moments"] + update
            if kind == "zero2":  # weights stay, as do summed fp32 gradients of bf16 arithmetic
                assert (memory.weights, memory.gradients) == (real["weights"], real["gradients"])
                host += real["masters"] // 2  # bf16 weights on their way back
            else:
                assert memory.state == 0
                host += real["weights"] + real["gradients"]
            assert memory.host.state == host * world_size, kind


LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
P = 8_030_261_248
BLOCK = 4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096
ROOT = 2 * 128256 * 4096 + 4096


def recipe(nodes: int = 1, seq_len: int = 8192, micro: int = 1, **strategy: Any) -> Recipe:
    return Recipe(
        model=Model(config=LLAMA3_8B, tokenizer="x", gradient_checkpointing="full"), adapter=Adapter(),
        data=Data(train=[Source(path="d.jsonl")], seq_len=seq_len),
        train=Train(global_batch_size=nodes * 8 * micro, micro_batch_size=micro, max_steps=1),
        strategy=Strategy(**strategy), cluster=Cluster(nodes=nodes, nproc_per_node=8),
    )  # fmt: skip


def memory_of(made: Recipe) -> Memory:
    memory = make_plan(made).memory
    assert memory is not None
    return memory


def test_llama3_8b_over_8_ranks_holds_a_sixteenth_of_every_byte_as_published():
    memory = memory_of(recipe(kind="fsdp2"))
    assert [round(part / GIB, 2) for part in (memory.weights, memory.gradients, memory.moments)] == [3.74, 3.74, 7.48]
    assert memory.state == 16 * P / 8
    assert memory.gathered == 2 * (ROOT + 2 * BLOCK)
    assert memory.buffers == 6 * BLOCK
    assert memory.host.reader == 4 * P
    assert memory.host.checkpoint == 12 * P


@pytest.mark.parametrize(
    ("kind", "weights", "masters", "gradients", "moments"),
    [
        ("ddp", 4, 0, 4, 8),
        ("zero1", 2, 4 / 8, 6, 8 / 8),
        ("zero2", 2, 4 / 8, 4 / 8, 8 / 8),
        ("zero3", 2 / 8, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_of_each_parameter_by_strategy_in_bf16_arithmetic_over_8_ranks(
    kind, weights, masters, gradients, moments
):
    memory = memory_of(recipe(kind=kind))
    told = [memory.weights, memory.masters, memory.gradients, memory.moments]
    assert told == [bytes_each * P for bytes_each in (weights, masters, gradients, moments)]


def test_gathered_weights_follow_resharding_and_prefetch():
    block, root, everything = 2 * BLOCK, 2 * ROOT, 2 * P
    assert memory_of(recipe(kind="fsdp2", prefetch=3)).gathered == root + 4 * block
    assert memory_of(recipe(kind="fsdp2", reshard_after_forward=False)).gathered == everything
    group = memory_of(recipe(nodes=2, kind="fsdp2", reshard_after_forward=8)).gathered
    assert group == root + 2 * block + (everything - root) // 8
    zero = recipe(kind="zero3")
    zero.strategy.zero.max_live_parameters = 0
    small = 2 * 65 * 4096
    largest, ahead = 128256 * 4096, 9 * 4096**2 // 10
    assert memory_of(zero).gathered == small + 2 * (largest + ahead)
    zero.strategy.zero.hpz_partition_size = 8
    assert memory_of(zero).gathered == small + 2 * (largest + ahead) + everything // 8


def test_whole_gradients_gather_only_where_nothing_is_reduced_between_micro_batches():
    def buffers(forwards: int, **strategy: Any) -> int:
        made = recipe(**strategy)
        made.train.global_batch_size *= forwards
        return memory_of(made).buffers

    assert buffers(4, kind="fsdp2") == buffers(1, kind="fsdp2")
    kept = {"kind": "fsdp2", "reshard_after_forward": False}
    assert buffers(4, **kept) - buffers(1, **kept) == 4 * P


def test_lora_has_gradients_and_moments_of_its_thin_matrices_alone():
    made = recipe(kind="ddp")
    made.adapter = Adapter(kind="lora", rank=16)
    made.model.dtype = "bf16"
    memory = memory_of(made)
    thin = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    assert (memory.weights, memory.gradients, memory.moments) == (2 * P + 4 * thin, 4 * thin, 8 * thin)
    plan = make_plan(made)
    assert plan.parameters is not None
    assert (plan.parameters.total, plan.parameters.trainable) == (P + thin, thin)


def test_offload_moves_state_to_the_node_and_says_how_much_its_disk_holds():
    both = memory_of(_offloaded("fsdp2", "cpu", "cpu"))
    assert (both.state, both.host.state) == (0, 16 * P)
    disk = memory_of(_offloaded("zero3", "nvme", "nvme"))
    assert (disk.state, disk.host.nvme, disk.host.state) == (0, (2 + 12) * P, 8 * P)
    half = memory_of(_offloaded("zero2", "cpu", "none"))
    assert (half.weights, half.masters, half.moments, half.host.state) == (2 * P, 0, 0, 18 * P)


def _offloaded(kind: str, optimizer: Any, params: Any) -> Recipe:
    made = recipe(kind=kind)
    made.strategy.offload.optimizer, made.strategy.offload.params = optimizer, params
    return made


def test_checkpoints_written_in_the_background_keep_a_copy_of_what_learns():
    made = recipe(nodes=2, kind="fsdp2", shard=8)
    assert memory_of(made).host.checkpoint == 12 * P // 2  # a node holds half: copies share the writing
    made.checkpoint.async_save = False
    assert memory_of(made).host.checkpoint == 0


def test_total_is_the_sum_of_its_parts_and_a_cpu_has_no_context():
    memory = memory_of(recipe(kind="zero2"))
    parts = [getattr(memory, field) for field in memory.__dataclass_fields__ if field not in ("total", "host")]
    assert memory.total == sum(parts)
    made = recipe(kind="zero2")
    made.cluster.accelerator = "cpu"
    assert memory_of(made).context == 0
    assert memory.context > 0


def test_rows_are_dealt_by_the_first_dimension_and_flat_groups_are_padded_to_twice_the_ranks():
    assert rows_share(Weight((301, 4), 2), 2) == 2 * 151 * 4
    assert rows_share(Weight((3,)), 8) == 1
    assert flat_groups([Weight((301, 4)), Weight((3,), 2), Weight((5, 5), trained=False)], 3) == [
        1206 - 1206 % 6 + 0,
        6,
    ]


def test_sizes_that_zero_chooses_are_those_of_the_configuration_it_is_given():
    from launcher.plan import architecture, memory
    from launcher.strategy import deepspeed

    made = recipe(kind="zero3")
    known = architecture(made)
    assert known is not None
    job = memory.Job.of(made, *known, Mesh(1, 8))
    told = deepspeed.config(made, world_size=8, device="cuda", precision="bf16")["zero_optimization"]
    largest = 128256 * 4096
    assert told["reduce_bucket_size"] == memory.zero_size(job, "reduce_bucket_size")
    assert told["stage3_param_persistence_threshold"] == memory.zero_size(job, "param_persistence_threshold")
    assert told["stage3_max_live_parameters"] == memory._live(job)
    made.strategy.zero.max_live_parameters = 0
    assert told["stage3_prefetch_bucket_size"] + largest == memory._live(job)
