"""`strategy.deepspeed`: what DeepSpeed does not know, or what the recipe says elsewhere, is an error with its fix."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from launcher.errors import RecipeError
from launcher.recipe.check import load
from launcher.shipped import folder
from launcher.strategy.deepspeed_keys import READ_IN, REFUSED, SAID_BY, check_overlay, known

TINY = folder("recipes") / "tiny-cpu.yaml"


def found(overlay, strategy="zero3"):
    recipe = load(TINY, [f"strategy={strategy}"]).recipe
    recipe.strategy.deepspeed = overlay
    return [str(problem) for problem in check_overlay(recipe)]


def test_the_snapshot_is_that_of_the_installed_deepspeed():
    """Else make it again, `python -m launcher.strategy._deepspeed_keys > .../deepspeed_keys.json`; look at the diff."""
    pytest.importorskip("deepspeed")
    from launcher.strategy._deepspeed_keys import snapshot

    text = resources.files("launcher.strategy").joinpath("deepspeed_keys.json").read_text()
    assert json.dumps(snapshot(), indent=1) + "\n" == text


GOOD = [
    {},
    {"wall_clock_breakdown": True},
    {"steps_per_print": 10},
    {"communication_data_type": "bf16"},
    {"flops_profiler": {"enabled": True, "profile_step": 3, "output_file": "flops.txt"}},
    {"comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}},
    {"tensorboard": {"enabled": True, "output_path": "tb"}},
    {"zero_optimization": {"contiguous_gradients": False, "stage3_max_reuse_distance": 5e8}},
    {"zero_optimization": {"leaf_module": {"names": ["model.layers.0"]}}},
    {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
]


@pytest.mark.parametrize("overlay", GOOD)
def test_what_nothing_here_says_may_be_laid_over(overlay):
    assert found(overlay) == []


def test_each_stage_takes_the_keys_that_it_reads():
    assert found({"zero_optimization": {"round_robin_gradients": True}}, "zero2") == []
    assert found({"zero_optimization": {"stage3_module_granularity_threshold": 0}}, "zero3") == []


BAD = [  # overlay, strategy, parts of the one complaint
    ({"steps_per_prnt": 1}, "zero3", "strategy.deepspeed.steps_per_prnt", "Did you mean 'steps_per_print'?"),
    ({"zero_optimization": {"contigous_gradients": 1}}, "zero3", "contigous_gradients", "'contiguous_gradients'?"),
    ({"tensorboard": {"output": "x"}}, "zero3", "strategy.deepspeed.tensorboard.output", "a key that DeepSpeed 0.19"),
    ({"steps_per_print": "ten"}, "zero3", "steps_per_print = ten", "a whole number"),
    ({"steps_per_print": True}, "zero3", "steps_per_print = true", "a whole number"),
    ({"wall_clock_breakdown": 1}, "zero3", "wall_clock_breakdown = 1", "true or false"),
    ({"communication_data_type": "bf61"}, "zero3", "expected one of fp32, bf16, fp16", "Did you mean 'bf16'?"),
    ({"zero_optimization": {"stage3_max_reuse_distance": -1}}, "zero3", "stage3_max_reuse_distance = -1", "0 or more"),
    ({"zero_optimization": 3}, "zero3", "zero_optimization = 3", "a section with keys"),
    ({"tensorboard": True}, "zero3", "tensorboard = true", "a section with keys such as enabled"),
    ({"train_batch_size": 8}, "zero3", "train_batch_size = 8", "Use train.global_batch_size."),
    ({"gradient_accumulation_steps": 1}, "zero3", "gradient_accumulation_steps", "Use train.global_batch_size and"),
    ({"gradient_clipping": 0.5}, "zero3", "gradient_clipping = 0.5", "Use train.max_grad_norm."),
    ({"bf16": {"enabled": True}}, "zero3", "bf16.enabled = true", "Use train.precision."),
    ({"fp16": {"enabled": True}}, "zero3", "fp16.enabled = true", "Use train.precision."),
    ({"fp16": {"initial_scale_power": 8}}, "zero3", "initial_scale_power = 8", "by the trainer's own rule: from 2^16"),
    ({"steps_per_print": 0}, "zero2", "steps_per_print = 0", "expected 1 or more"),
    ({"zero_optimization": {"stage3_module_granularity_threshold": -5}}, "zero3", "= -5", "expected 0 or more"),
    ({"log_level": "loud"}, "zero3", "log_level = loud", "one of debug, info"),
    ({"disable_allgather": True}, "zero2", "disable_allgather = true", "reads it nowhere"),
    ({"zero_optimization": {"stage3_max_reuse_distance": 5}}, "zero2", "strategy.kind=zero2", "zero3 alone read"),
    ({"zero_optimization": {"leaf_module": {"names": ["a"]}}}, "zero1", "strategy.kind=zero1", "zero3 alone read"),
    ({"zero_optimization": {"round_robin_gradients": True}}, "zero3", "strategy.kind=zero3", "zero1 and zero2 alone"),
    ({"optimizer": {"type": "Adam"}}, "zero3", "optimizer = {...}", "Use the section optimizer."),
    ({"scheduler": {"type": "WarmupLR"}}, "zero3", "scheduler = {...}", "Use optimizer.schedule."),
    ({"zero_optimization": {"stage": 2}}, "zero3", "zero_optimization.stage = 2", "Use strategy.kind."),
    ({"zero_optimization": {"reduce_bucket_size": 5}}, "zero3", "= 5", "Use strategy.zero.reduce_bucket_size."),
    ({"zero_optimization": {"cpu_offload": True}}, "zero3", "cpu_offload = true", "Use strategy.offload.optimizer."),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero3-offload",
        "offload_optimizer.device = cpu", "Use strategy.offload.optimizer.",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"buffer_count": 4}}}, "zero3",
        "nothing while nothing is offloaded to it", "Set strategy.offload.optimizer=cpu.",
    ),
    ({"aio": {"queue_depth": 32}}, "zero3-offload", "aio = {...}", "Set strategy.offload.optimizer=nvme."),
    ({"gradient_allreduce_op": "sum"}, "zero3", "gradient_allreduce_op = sum", "mean over tokens"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero3", "zero_force_ds_cpu_optimizer", "makes the optimizer"),
    ({"tensor_parallel": {"autotp_size": 2}}, "zero3", "tensor_parallel = {...}", "data parallel alone"),
    ({"comet": {"api_key": "s"}}, "zero3", "comet.api_key", "export COMET_API_KEY"),
    ({"elasticity": {"enabled": True}}, "zero3", "elasticity = {...}", "no such key: Elastic training has been"),
    ({"zero_optimization": {"mics_shard_size": 4}}, "zero3", "mics_shard_size = 4", "MiCS ZeRO-3 sharding has been"),
    (
        {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}}, "zero3",
        "stage3_gather_fp16_weights_on_model_save", "DeepSpeed has renamed it",
    ),
    ({"zero_optimization": {"zenflow": {}}}, "zero3", "zenflow", "a step late"),
]  # fmt: skip


@pytest.mark.parametrize(("overlay", "strategy", "key", "fix"), BAD)
def test_one_complaint_names_key_value_and_what_to_write(overlay, strategy, key, fix):
    said = found(overlay, strategy)
    assert len(said) == 1
    assert key in said[0]
    assert fix in said[0]


def test_a_key_of_a_used_offload_may_be_laid_over():
    assert found({"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}}, "zero3-offload") == []
    assert found({"aio": {"queue_depth": 32}}, "zero3-nvme") == []


def test_all_complaints_come_at_once():
    zero = {"stage": 1, "overlap": 1}
    assert len(found({"steps_per_prnt": 1, "bf16": {"enabled": True}, "zero_optimization": zero})) == 4


def test_every_key_that_is_refused_is_one_that_deepspeed_knows():
    for key in {**SAID_BY, **REFUSED, **READ_IN}:
        keys = known()["keys"]
        *sections, last = key.split(".")
        for section in sections:
            keys = keys[section]["keys"]
        assert last in keys, key


def test_every_key_that_a_recipe_says_elsewhere_is_named_by_one_that_exists():
    recipe = load(TINY, ["strategy=zero3"]).recipe
    for ours in SAID_BY.values():
        for key in ours.removeprefix("the section ").split(" and "):
            place = recipe
            for part in key.split("."):
                place = getattr(place, part)


def test_no_key_is_made_by_us_and_also_laid_over():
    """Whatever the typed keys of a recipe decide, strategy.deepspeed may not say again."""
    from launcher.strategy.deepspeed import explain

    recipe = load(TINY, ["strategy=zero3-nvme"]).recipe
    made = explain(recipe, world_size=2, device="cuda", precision="fp16")
    ours = {key for key, (_, why) in made.items() if why.startswith(("strategy.", "train.", "model."))}
    refused = {**SAID_BY, **REFUSED}
    assert [key for key in ours if not any(f"{key}.".startswith(f"{said}.") for said in refused)] == []


def test_check_says_it_with_the_place_in_the_recipe(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"strategy\.deepspeed\.train_batch_size = 4: expected nothing here"):
        load(TINY, ["strategy=zero2", "strategy.deepspeed.train_batch_size=4"])
