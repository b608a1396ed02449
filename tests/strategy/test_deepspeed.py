"""DeepSpeed's configuration: literal, consistent with the plan, explained, and accepted by DeepSpeed itself."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os

import pytest

from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.shipped import folder
from launcher.strategy.deepspeed import MOE_BLOCKS, config, explain, problems, settings
from launcher.strategy.explained import dotted, nested
from tests.jobs.make import MODEL

TINY = folder("recipes") / "tiny-cpu.yaml"
HUB = folder("recipes") / "llama3.1-8b-fsdp2.yaml"
PRESETS = ("zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "zero3-nvme")


def made(*overrides: str, path=TINY, world_size=2, device="cuda", precision="bf16"):
    recipe = load(path, overrides).recipe
    return dotted(config(recipe, world_size=world_size, device=device, precision=precision))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("device", "precision"), list(itertools.product(["cuda", "cpu"], ["fp32", "bf16", "fp16"])))
def test_every_value_is_literal_has_a_reason_and_survives_json(preset, device, precision):
    recipe = load(TINY, [f"strategy={preset}"]).recipe
    found = explain(recipe, world_size=2, device=device, precision=precision)
    assert all(reason for _, reason in found.values())
    assert "auto" not in [value for value, _ in found.values()]
    values = config(recipe, world_size=2, device=device, precision=precision)
    assert json.loads(json.dumps(values)) == values == nested(found)


@pytest.mark.parametrize(("ranks", "rows", "micro"), [(1, 8, 1), (2, 8, 2), (3, 8, 1), (4, 8, 2), (5, 8, 1)])
def test_the_batch_is_that_of_the_plan_also_where_it_does_not_divide(ranks, rows, micro):
    recipe = load(TINY, ["strategy=zero2", f"train.global_batch_size={rows}", "train.micro_batch_size=1"]).recipe
    recipe.train.micro_batch_size, recipe.cluster.nproc_per_node = micro, ranks
    plan = make_plan(recipe)
    found = config(recipe, world_size=ranks, device="cpu", precision="fp32")
    assert found["gradient_accumulation_steps"] == plan.accumulation_steps
    assert found["train_micro_batch_size_per_gpu"] == micro
    assert found["train_batch_size"] == micro * plan.accumulation_steps * ranks >= rows


@pytest.mark.parametrize(("ranks", "said"), [(2, "1 x 4 x 2 ranks"), (3, "1 x 3 x 3 ranks: 8 rows")])
def test_slots_that_stay_empty_stand_in_the_reason_of_the_batch_size(ranks, said):
    recipe = load(TINY, ["strategy=zero2", "train.global_batch_size=8"]).recipe
    value, reason = explain(recipe, world_size=ranks, device="cpu", precision="fp32")["train_batch_size"]
    assert reason.startswith(said)
    assert ("padded with 1 of weight 0" in reason) == (value == 9) == (ranks == 3)


def test_bucket_sizes_follow_the_hidden_size_as_transformers_chooses_them():
    hidden = load(TINY).recipe.model.config["hidden_size"]
    found = made("strategy=zero3")
    assert found["zero_optimization.reduce_bucket_size"] == hidden * hidden
    assert found["zero_optimization.stage3_prefetch_bucket_size"] == int(0.9 * hidden * hidden)
    assert found["zero_optimization.stage3_param_persistence_threshold"] == 10 * hidden


def test_an_unknown_architecture_is_taken_for_8b_and_the_reason_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    recipe = load(HUB, ["strategy=zero3-nvme"]).recipe
    found = explain(recipe, world_size=16, device="cuda", precision="bf16")
    value, reason = found["zero_optimization.reduce_bucket_size"]
    assert value == 4096 * 4096
    assert "assumed" in reason
    assert "assumed" in found["zero_optimization.offload_param.buffer_size"][1]


@pytest.mark.parametrize(
    ("key", "value", "at"),
    [
        ("reduce_bucket_size", 1000, "reduce_bucket_size"),
        ("prefetch_bucket_size", 0, "stage3_prefetch_bucket_size"),
        ("param_persistence_threshold", 0, "stage3_param_persistence_threshold"),
        ("max_live_parameters", 7, "stage3_max_live_parameters"),
        ("max_live_parameters", 7, "stage3_max_reuse_distance"),
        ("sub_group_size", 9, "sub_group_size"),
        ("overlap_comm", False, "overlap_comm"),
        ("hpz_partition_size", 2, "zero_hpz_partition_size"),
        ("quantized_weights", True, "zero_quantized_weights"),
        ("leaf_modules", ["Block"], "leaf_module.classes"),
    ],
)
def test_a_typed_key_is_what_deepspeed_gets(key, value, at):
    recipe = load(TINY, ["strategy=zero3"]).recipe
    setattr(recipe.strategy.zero, key, value)
    found = explain(recipe, world_size=2, device="cuda", precision="bf16")[f"zero_optimization.{at}"]
    assert found[0] == value
    assert found[1].startswith(f"strategy.zero.{key}")


@pytest.mark.parametrize(("device", "on"), [("cuda", True), ("cpu", False)])
def test_overlap_and_pinned_memory_are_for_a_gpu(device, on):
    found = made("strategy=zero3-offload", device=device)
    assert found["zero_optimization.overlap_comm"] is on
    assert found["zero_optimization.offload_optimizer.pin_memory"] is on
    assert found["zero_optimization.offload_param.pin_memory"] is on


def test_nvme_brings_a_folder_buffers_for_the_largest_weight_and_the_section_aio():
    found = made("strategy=zero3-nvme", "strategy.offload.nvme_path=/fast")
    assert found["zero_optimization.offload_param.nvme_path"] == "/fast"
    vocabulary, hidden = (load(TINY).recipe.model.config[key] for key in ("vocab_size", "hidden_size"))
    buffer = found["zero_optimization.offload_param.buffer_size"]
    assert vocabulary * hidden / 2 <= buffer < vocabulary * hidden / 2 + 1024
    assert found["aio.block_size"] == 1048576
    assert not [key for key in made("strategy=zero3-offload") if key.startswith("aio")]


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_summed_and_reduced_in_fp32(preset, precision):
    found = made(f"strategy={preset}", precision=precision)
    assert (found["communication_data_type"], found["data_types.grad_accum_dtype"]) == ("fp32", "fp32")
    assert (found["bf16.enabled"], found["fp16.enabled"]) == (precision == "bf16", precision == "fp16")


def test_weights_kept_in_bf16_have_no_fp32_copy():
    bare = made("strategy=zero2", "model.dtype=bf16")
    assert bare["bf16.bf16_master_weights_and_grads"]
    assert bare["bf16.bf16_optimizer_states"]
    assert bare["data_types.grad_accum_dtype"] == "bf16"


def test_the_loss_scale_of_fp16_starts_and_moves_as_that_of_the_other_engines():
    import torch

    from launcher.trainer.optim import LossScale

    ours, found = LossScale.start(torch.device("cpu")), made("strategy=zero2", precision="fp16")
    assert 2.0 ** found["fp16.initial_scale_power"] == float(ours.value)
    assert found["fp16.loss_scale_window"] == ours.growth_interval
    assert found["fp16.hysteresis"] == 1
    ours.value.fill_(1.0)
    ours.update(torch.tensor(True))
    assert found["fp16.min_loss_scale"] == float(ours.value)


@pytest.mark.parametrize(("norm", "clip"), [("0.3", 0.3), ("null", 0.0)])
def test_clipping_is_that_of_the_recipe(norm, clip):
    assert made("strategy=zero2", f"train.max_grad_norm={norm}")["gradient_clipping"] == clip


def test_blocks_of_experts_are_gathered_whole():
    moe = {**MODEL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    recipe = load(TINY, ["strategy=zero3"]).recipe
    recipe.model.config = moe
    found = explain(recipe, world_size=2, device="cpu", precision="fp32")
    assert found["zero_optimization.leaf_module.classes"][0] == ["MixtralSparseMoeBlock"]
    assert not [key for key in made("strategy=zero3") if "leaf" in key]


def test_names_of_expert_blocks_are_those_of_transformers():
    found = importlib.util.find_spec("transformers")  # without importing it
    if found is None or found.origin is None:
        pytest.skip("transformers is not installed")
    folder = os.path.join(os.path.dirname(found.origin), "models")
    for family, name in MOE_BLOCKS.items():
        with open(os.path.join(folder, family, f"modeling_{family}.py")) as file:
            assert f"class {name}(" in file.read(), family


def test_what_is_laid_over_wins_and_an_empty_section_takes_nothing_away():
    recipe = load(TINY, ["strategy=zero3"]).recipe
    recipe.strategy.deepspeed = {"zero_optimization": {"stage3_max_reuse_distance": 5}, "data_types": {}, "dump": 1}
    found = config(recipe, world_size=2, device="cuda", precision="bf16")
    assert found["zero_optimization"]["stage3_max_reuse_distance"] == 5
    assert found["zero_optimization"]["stage"] == 3
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("accelerator", "asked", "expected"),
    [("cpu", "auto", "fp32"), ("cuda", "auto", "bf16"), ("auto", "auto", "bf16"), ("cpu", "bf16", "bf16")],
)
def test_auto_precision_of_a_rendered_job_is_bf16_but_on_the_cpu(accelerator, asked, expected):
    recipe = load(TINY, ["strategy=zero2", f"train.precision={asked}"]).recipe
    recipe.cluster.accelerator = accelerator
    found = settings(recipe, make_plan(recipe))
    assert found["bf16.enabled"][0] is (expected == "bf16")


def test_weights_in_bf16_with_an_offloaded_update_are_refused_and_an_odd_bucket_too():
    recipe = load(TINY, ["strategy=zero2-offload"]).recipe
    assert list(problems(recipe)) == []
    recipe.model.dtype, recipe.strategy.zero.allgather_bucket_size = "bf16", 1001
    assert [p.key for p in problems(recipe)] == ["strategy.zero.allgather_bucket_size", "model.dtype"]


@pytest.mark.parametrize("preset", PRESETS)
def test_deepspeed_loads_what_is_made(preset):
    pytest.importorskip("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = load(TINY, [f"strategy={preset}"]).recipe
    for precision in ("fp32", "bf16", "fp16"):
        loaded = DeepSpeedConfig(config(recipe, world_size=1, device="cpu", precision=precision))
        assert loaded.zero_config.stage == int(preset[4])
        assert loaded.gradient_accumulation_steps == 8
        assert loaded.float16_config.enabled is (precision == "fp16")
        assert not loaded.timers_config.enabled
