"""Accelerate's file: what it says of each strategy, and that Accelerate reads every key of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.jobs._configs import PRESETS
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.shipped import folder
from launcher.strategy.accelerate import config, explain
from launcher.strategy.explained import dotted, nested

RECIPE = "tiny-cpu.yaml"
FILES = folder("configs") / "accelerate"


def made(*overrides: str) -> dict[str, Any]:
    recipe = load(folder("recipes") / RECIPE, overrides).recipe
    return config(recipe, make_plan(recipe))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=ddp"], {"distributed_type": "MULTI_GPU", "mixed_precision": "no", "num_processes": 2}),
        (["strategy=ddp", "train.precision=bf16"], {"mixed_precision": "bf16"}),
        (["strategy=ddp", "model.dtype=bf16"], {"mixed_precision": "no"}),
        (["strategy=ddp", "model.compile=true"], {"dynamo_config.dynamo_backend": "INDUCTOR"}),
        (["strategy=fsdp2"], {"distributed_type": "FSDP", "fsdp_config.fsdp_version": 2}),
        (["strategy=fsdp2-offload"], {"fsdp_config.fsdp_offload_params": True}),
        (["strategy=fsdp2", "strategy.reshard_after_forward=false"], {"fsdp_config.fsdp_reshard_after_forward": False}),
        (["strategy=fsdp2", "strategy.reshard_after_forward=2"], {"fsdp_config.fsdp_reshard_after_forward": True}),
        (
            ["strategy=fsdp2", "model.gradient_checkpointing=offload"],
            {"fsdp_config.fsdp_activation_checkpointing_offload": True},
        ),
        (
            ["strategy=hsdp", "cluster.nodes=2"],
            {
                "parallelism_config.parallelism_config_dp_replicate_size": 2,
                "parallelism_config.parallelism_config_dp_shard_size": 2,
                "num_machines": 2,
                "machine_rank": 0,
            },
        ),
        (["strategy=zero2"], {"deepspeed_config.zero3_init_flag": False}),
        (["strategy=zero3"], {"deepspeed_config.deepspeed_config_file": "deepspeed.json"}),
        (["strategy=zero3", "cluster.nodes=2"], {"deepspeed_config.deepspeed_multinode_launcher": "standard"}),
    ],
)
def test_the_file_says_what_the_recipe_says(overrides, expected):
    found = dotted(made(*overrides))
    assert {key: found.get(key) for key in expected} == expected


def test_deepspeed_is_told_nothing_beside_its_file():
    found = made("strategy=zero3-offload", "train.precision=bf16")
    assert "mixed_precision" not in found
    assert set(found["deepspeed_config"]) == {"deepspeed_config_file", "zero3_init_flag"}


def test_every_value_has_a_reason():
    for preset in PRESETS["accelerate"]:
        recipe = load(folder("recipes") / RECIPE, [f"strategy={preset}"]).recipe
        found = explain(recipe, make_plan(recipe))
        assert all(reason for _, reason in found.values())
        assert nested(found) == config(recipe, make_plan(recipe))


SHIPPED = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FILES.glob("*.yaml"))}
OTHERS = {  # not shipped, for the keys that only they have
    "compiled": made("strategy=ddp", "model.compile=true"),
    "recomputed": made("strategy=fsdp2", "model.gradient_checkpointing=offload"),
    "two-nodes": made("strategy=zero3", "cluster.nodes=2"),
}
KEYS = [(name, key) for name, values in {**SHIPPED, **OTHERS}.items() for key in dotted(values)]


@pytest.fixture
def write(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    for name in ("deepspeed.json", "other.json"):
        stage = {"deepspeed.json": "zero2", "other.json": "zero1"}[name]
        (tmp_path / name).write_text((folder("configs") / "deepspeed" / f"{stage}.json").read_text())

    def write(values: dict[str, Any]) -> Path:
        file = tmp_path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


@pytest.mark.parametrize(("name", "key"), KEYS, ids=[f"{name}-{key.rpartition('.')[2]}" for name, key in KEYS])
def test_accelerate_reads_the_key_so_that_another_value_makes_a_difference(name, key, write):
    values = {**SHIPPED, **OTHERS}[name]
    in_plugins = key.startswith(("fsdp_config.", "parallelism_config.", "dynamo_config."))  # a variable is not enough
    assert outcome(write(changed(values, key)), in_plugins) != outcome(write(values), in_plugins)


def outcome(file: Path, in_plugins: bool) -> Any:
    """What Accelerate makes of a file, or that it read a value and does not take it."""
    from tests.strategy.launched import launched

    try:
        found = launched(file)
        return found["plugins"] if in_plugins else found
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as refused:
        return f"refused: {refused}"


def changed(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The same file with another value at `key`."""
    other = copy.deepcopy(values)
    *sections, last = key.split(".")
    place = other
    for section in sections:
        place = place[section]
    now = place[last]
    if isinstance(now, bool):
        place[last] = not now
    elif isinstance(now, int):
        place[last] = 29511 if last == "main_process_port" else now * 2 or 1
    else:
        place[last] = _OTHER_WORDS[now]
    return other


_OTHER_WORDS = {
    "LOCAL_MACHINE": "AMAZON_SAGEMAKER", "MULTI_GPU": "FSDP", "FSDP": "MULTI_GPU", "DEEPSPEED": "MULTI_GPU",
    "bf16": "fp16", "no": "bf16", "INDUCTOR": "EAGER", "TRANSFORMER_BASED_WRAP": "NO_WRAP",
    "SHARDED_STATE_DICT": "FULL_STATE_DICT", "deepspeed.json": "other.json", "standard": "pdsh",
}  # fmt: skip


def test_a_key_that_accelerate_drops_would_be_noticed(write):
    """The proof above can fail: these are the traps that the file keeps out of."""
    from tests.strategy.launched import launched

    values = SHIPPED["hsdp"]
    before = launched(write(values))
    assert launched(write({**values, "rdzv_backend": "c10d"})) == before
    assert launched(write({**values, "same_network": True})) == before
    nested_typo = {**values, "fsdp_config": {**values["fsdp_config"], "fsdp_reshard_after_foward": False}}
    assert launched(write(nested_typo)) == before


def test_options_of_the_scripts_of_several_nodes_reach_torchrun(write):
    from tests.strategy.launched import launched

    options = ["--machine_rank", "1", "--main_process_ip", "host", "--main_process_port", "4321"]
    found = launched(write(SHIPPED["hsdp"]), *options, "--rdzv_backend", "c10d")["torchrun"]
    assert found["nnodes"] == "2"
    assert found["nproc_per_node"] == "8"
    assert found["node_rank"] == 1
    assert (found["rdzv_endpoint"], found["rdzv_backend"]) == ("host:4321", "c10d")


def test_a_deepspeed_file_named_on_the_command_line_wins(write, tmp_path):
    from tests.strategy.launched import launched

    found = launched(write(SHIPPED["zero2"]), "--deepspeed_config_file", str(tmp_path / "other.json"))
    assert found["environment"]["ACCELERATE_DEEPSPEED_CONFIG_FILE"].endswith("other.json")
