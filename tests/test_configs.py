"""configs/: each file is what `launcher render` gives, and its library's own loader takes it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli.render import command as render
from launcher.jobs import begin
from launcher.jobs._configs import PRESETS, RECIPE, files, main, overrides
from launcher.shipped import folder

CONFIGS = folder("configs")
NAMES = [
    f"{kind}/{preset}{'.json' if kind == 'deepspeed' else '.yaml'}" for kind in PRESETS for preset in PRESETS[kind]
]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict[str, str]:
    """Where no model is in a local hub cache; the next test says that one makes no difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return dict(files())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_is_byte_for_byte_what_render_gives(name, rendered):
    assert (CONFIGS / name).read_text() == rendered[name]


def test_there_is_no_other_file(rendered):
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file()}
    assert found == {*NAMES, "README.md"}
    assert set(rendered) == set(NAMES)


def test_the_generator_writes_them_into_a_folder(tmp_path, rendered):
    main(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == set(NAMES)


def test_the_model_in_a_local_hub_cache_changes_no_byte(tmp_path, monkeypatch, rendered):
    """So that the files are the same on every machine: what is assumed of an unknown model is Llama 3.1 8B."""
    snapshot = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    (snapshot / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }))  # fmt: skip
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert dict(files()) == rendered


def commands(verb: str) -> list[list[str]]:
    """The README's lines that begin with these words, without their remarks."""
    lines = [line.split("#")[0] for line in (CONFIGS / "README.md").read_text().splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(f"    {verb} ")]


@pytest.mark.parametrize("arguments", commands("launcher render"), ids=lambda arguments: " ".join(arguments[-2:]))
def test_each_render_of_the_readme_works_as_written_from_a_checkout(arguments, tmp_path, monkeypatch):
    """Written by -o, the files are found where the next command of the README looks for them."""
    (tmp_path / "recipes").symlink_to(folder("recipes"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(render, arguments[2:])
    assert done.exit_code == 0, done.output
    if "-o" in arguments:
        assert {"recipe.yaml", "deepspeed.json", "accelerate.yaml", "job.sh"} == {
            f.name for f in Path("job").iterdir()
        } - {"plan.json"}


def test_begin_of_the_readme_takes_what_it_is_given():
    (line,) = commands("python -m launcher.jobs.begin")
    assert begin.read(line[3:]) == (Path("job/recipe.yaml"), None, [])


def test_the_readme_names_every_file_and_the_command_that_makes_it():
    text = (CONFIGS / "README.md").read_text()
    for name in NAMES:
        assert f"`{Path(name).name}`" in text
    assert RECIPE in text
    assert " ".join(overrides("zero3")) in text


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("deepspeed/")])
def test_deepspeed_loads_the_file_and_knows_every_key(name):
    pytest.importorskip("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    from launcher.strategy.deepspeed_keys import known

    ranks = 16 if "zeropp" in name else 8
    values = json.loads((CONFIGS / name).read_text())
    assert "auto" not in json.dumps(values)
    _assert_known(values, known()["keys"])
    values["train_batch_size"] //= ranks  # this process is one rank
    loaded = DeepSpeedConfig(values)
    zero = values["zero_optimization"]
    assert loaded.zero_config.stage == zero["stage"]
    assert loaded.zero_config.reduce_bucket_size == zero["reduce_bucket_size"]
    assert (loaded.zero_config.offload_optimizer is not None) == ("offload_optimizer" in zero)
    assert (loaded.gradient_accumulation_steps, loaded.gradient_clipping) == (64 // ranks, 1.0)
    assert loaded.bfloat16_config.enabled


def _assert_known(values, keys):
    """DeepSpeed itself reads past a key that it does not know outside its models."""
    for name, value in values.items():
        assert name in keys
        if "keys" in keys[name]:
            _assert_known(value, keys[name]["keys"])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("accelerate/")])
def test_accelerate_loads_the_file_and_its_plugins_say_the_same(name, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    from tests.strategy.launched import launched

    preset = Path(name).stem
    (tmp_path / "accelerate.yaml").write_text((CONFIGS / name).read_text())
    if preset.startswith("zero"):
        (tmp_path / "deepspeed.json").write_text((CONFIGS / "deepspeed" / f"{preset}.json").read_text())
    found = launched(tmp_path / "accelerate.yaml")
    assert found["torchrun"]["nproc_per_node"] == "8"
    plugins = found["plugins"]
    if preset.startswith("zero"):
        assert f"('zero_stage', '{preset[4]}')" in plugins["deepspeed"]
        assert ("('offload_optimizer_device', 'cpu')" in plugins["deepspeed"]) == preset.endswith("offload")
        assert "('gradient_accumulation_steps', '8')" in plugins["deepspeed"]
    else:
        assert found["environment"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
        assert ("fsdp" in plugins) == (preset != "ddp")
        assert ("mesh" in plugins) == (preset == "hsdp")
    if "fsdp" in plugins:
        assert "('fsdp_version', '2')" in plugins["fsdp"]
        assert ("CPUOffloadPolicy" in plugins["fsdp"]) == preset.endswith("offload")
