"""Every recipe and preset that comes with the launcher is good, says what it needs, and is planned and rendered."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.jobs.spec import job_spec
from launcher.jobs.targets import TARGETS, render
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.compose import SECTIONS, compose
from launcher.shipped import folder
from tests.recipe.make import GOOD, write

RECIPES = sorted(folder("recipes").glob("*.yaml"))
PRESETS = sorted(folder("recipes").glob("*/*.yaml"))
COMMAND = re.compile(r"^# .*?: +launcher (\w+) (recipes/\S+)(.*)$", re.MULTILINE)


ARCHITECTURES: dict[str, dict[str, Any]] = {  # config.json of the hub models that recipes name, as far as it has sizes
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
}  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(folder("recipes")))


def test_every_strategy_has_a_preset():
    assert {path.stem for path in PRESETS if path.parent.name == "strategy"} == {
        "ddp", "fsdp2", "fsdp2-offload", "hsdp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload",
        "zero3-nvme", "zeropp",
    }  # fmt: skip


def test_there_are_recipes_and_presets_of_five_sections():
    assert len(RECIPES) >= 11
    assert {path.parent.name for path in PRESETS} == {"model", "data", "strategy", "cluster", "train"}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_shipped_recipe_is_checked_and_planned(path: Path):
    composed = load(path)
    plan = make_plan(composed.recipe)
    assert plan.world_size == composed.recipe.cluster.nodes * composed.recipe.cluster.nproc_per_node
    assert plan.global_batch_size == plan.world_size * plan.micro_batch_size * plan.accumulation_steps


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_shipped_recipe_fits_the_gpus_it_names(path: Path, here: Path):
    model, overrides = compose(path).recipe.model, []
    if model.config is None:
        (here / "config.json").write_text(json.dumps(ARCHITECTURES[str(model.name)]))
        overrides = [f"model.name={here}"]
    recipe = load(path, overrides).recipe
    memory = make_plan(recipe).memory
    assert memory is not None
    if recipe.cluster.gpu_memory_gib is not None:
        assert 0.1 < memory.total / (recipe.cluster.gpu_memory_gib * 2**30) < 0.9


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_shipped_recipe_is_rendered_by_the_command_and_nothing_is_written(path: Path, tmp_path: Path):
    from launcher.cli import main

    with pytest.raises(SystemExit) as exit:
        main(["render", str(path), "--target", "torchrun"])
    assert exit.value.code == 0
    assert not list(tmp_path.iterdir())  # it submits and writes nothing; tests/jobs/test_every_target.py has the others


@pytest.mark.parametrize("cluster", ["local", "node8", "node8x2"])
@pytest.mark.parametrize("strategy", [path.stem for path in PRESETS if path.parent.name == "strategy"])
def test_a_strategy_alone_is_changed_and_the_job_is_checked_planned_and_rendered(
    here: Path, strategy: str, cluster: str
):
    text = GOOD.replace("global_batch_size: 8", "global_batch_size: 16")
    composed = load(write(here, text), [f"strategy={strategy}", f"cluster={cluster}"])
    plan = make_plan(composed.recipe)
    assert plan.mesh.replicate * plan.mesh.shard == plan.world_size
    for target in TARGETS:
        rendered = render(job_spec(composed.recipe, plan), target=target)
        assert rendered.command
        assert rendered.files


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_a_preset_says_what_it_is_for_in_one_line(path: Path):
    first, *others = path.read_text().splitlines()
    assert first.startswith("# ")
    assert first[-1] in ".?"
    assert not any(line.startswith("#") for line in others)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_command_in_a_header_names_the_recipe_and_passes_check(path: Path, here: Path):
    (here / "chat.jsonl").write_text("{}\n")
    commands = COMMAND.findall(path.read_text())
    assert len(commands) >= 2
    for verb, recipe, rest in commands:
        import_module(f"launcher.cli.{verb}")
        assert recipe == f"recipes/{path.name}"
        load(path, [word for word in shlex.split(rest) if not word.startswith("-")])


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_header_says_what_it_is_what_it_needs_and_what_was_measured(path: Path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Needs:", "# Look:", "# Smoke:", "Measured:"):
        assert word in header


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_shipped_recipe_writes_only_what_differs_from_the_defaults(path: Path):
    composed = compose(path)
    default = compose(write(Path.cwd(), GOOD))
    written = {key for key, origin in composed.origins.items() if origin.file_or_argument.endswith(path.name)}
    for key in written & set(default.origins):
        if str(default.origins[key]) == "default" and "." in key:
            section, _, rest = key.partition(".")
            assert _at(composed, section, rest) != _at(default, section, rest), f"{key} is the default"


def _at(composed: object, section: str, rest: str) -> object:
    found = getattr(composed.recipe, section)  # type: ignore[attr-defined]
    for part in rest.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    return found


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_a_shipped_preset_composes_alone_and_says_what_it_is(path: Path, here: Path):
    assert path.read_text().startswith("# ")
    section = path.parent.name
    assert section in SECTIONS
    composed = compose(write(here), [f"{section}={path.stem}"])
    keys = yaml.safe_load(path.read_text())
    for key in keys:
        origins = [origin for name, origin in composed.origins.items() if name.startswith(f"{section}.{key}")]
        assert any(origin.file_or_argument.endswith(f"{section}/{path.name}") for origin in origins)


def test_shipped_folders_are_found_inside_a_wheel_before_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "launcher" / "shipped" / "recipes").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    assert folder("recipes") == tmp_path / "launcher" / "shipped" / "recipes"
    with pytest.raises(FileNotFoundError, match="configs"):
        folder("configs")
