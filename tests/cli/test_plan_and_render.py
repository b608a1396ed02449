"""`launcher plan` and `launcher render`: what they print, and that only -o writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli.plan import command as plan
from launcher.cli.render import command as render
from launcher.errors import UserError
from launcher.plan import Plan, make_plan
from launcher.recipe.check import load

RECIPE = str(Path(__file__).parents[2] / "recipes" / "tiny-cpu.yaml")
GPU_RECIPE = str(Path(__file__).parents[2] / "recipes" / "llama3.1-8b-fsdp2.yaml")


def call(command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_plan_as_json_is_the_documented_object_and_reads_back():
    printed = json.loads(call(plan, RECIPE, "--json").stdout)
    assert Plan.from_dict(printed) == make_plan(load(RECIPE).recipe)
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    nested = [printed["memory"]["host"], *(printed[part] for part in ("parameters", "memory", "traffic"))]
    fields = [*printed, *(field for part in nested for field in part)]
    assert [field for field in fields if field not in documented] == []


def test_plan_as_a_table_says_ranks_batch_memory_and_traffic():
    text = call(plan, RECIPE, "cluster.nproc_per_node=4", "train.global_batch_size=16").stdout
    assert "4 = 1 x 4" in text
    assert "16 rows = 4 ranks x 1 a forward x 4 forwards" in text
    assert "11,798,976" in text
    assert "MiB on the fullest rank: unchecked: cluster.gpu_memory_gib is null" in text
    for part in ("weights", "gradients", "moments", "gathered", "activations", "logits"):
        assert f"\n  {part} " in text
    assert "400 GB/s" not in text, "a figure of GPUs, on the CPU"
    assert "tokens of a rank at 400 GB/s" in call(plan, RECIPE, "cluster.accelerator=cuda").stdout


def test_plan_counts_one_thing_as_one():
    one = ["cluster.nproc_per_node=1", "train.global_batch_size=1", "train.max_steps=null", "train.epochs=1"]
    text = call(plan, RECIPE, *one).stdout
    assert "1 row = 1 rank x 1 a forward x 1 forward\n" in text
    assert "1 epoch, steps known when prepared" in text
    assert "1 step\n" in call(plan, RECIPE, "train.max_steps=1").stdout


def test_plan_says_how_much_of_the_gpu_is_left_what_learns_and_what_is_recomputed():
    text = call(
        plan, RECIPE, "cluster.accelerator=cuda", "cluster.gpu_memory_gib=24", "adapter.kind=lora",
        "model.gradient_checkpointing=full",
    ).stdout  # fmt: skip
    assert "of 24 GiB left" in text
    assert " trained (lora)" in text
    assert " recomputed" in text


def test_plan_of_a_model_that_is_not_here_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    text = call(plan, GPU_RECIPE).stdout
    assert "parameters     unknown: meta-llama/Llama-3.1-8B is neither a folder" in text
    assert "fetch it: hf download meta-llama/Llama-3.1-8B config.json" in text
    assert "memory         unchecked" in text


def test_render_prints_every_file_whole_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call(render, RECIPE).stdout
    for name in ("recipe.yaml", "plan.json", "fsdp2.json", "job.sh", "command"):
        assert f"==> {name} <==" in text
    assert "torchrun --standalone" in text
    assert str(tmp_path / "runs" / "tiny-cpu") in text  # absolute: the same run from any folder
    assert list(tmp_path.iterdir()) == []


def test_render_with_o_writes_exactly_the_files_that_json_shows(tmp_path):
    shown = json.loads(call(render, GPU_RECIPE, "--json").stdout)
    call(render, GPU_RECIPE, "-o", str(tmp_path / "job"))
    written = {file.name: file.read_text() for file in (tmp_path / "job").iterdir()}
    assert written == shown["files"]
    assert {"node-0.sh", "node-1.sh"} <= set(written)
    assert shown["command"].count("LAUNCHER_RENDEZVOUS=HOST:PORT bash node-") == 2


def test_the_rendered_recipe_is_the_same_recipe_again(tmp_path):
    call(render, RECIPE, "optimizer.lr=1e-5", "-o", str(tmp_path))
    again, first = load(tmp_path / "recipe.yaml").recipe, load(RECIPE, ["optimizer.lr=1e-5"]).recipe
    assert again == first


def test_render_to_a_folder_that_cannot_be_written_is_a_users_error():
    with pytest.raises(UserError, match=r"-o /proc/nowhere: cannot be written"):
        call(render, RECIPE, "-o", "/proc/nowhere")


def test_render_for_an_unknown_target_names_torchrun():
    with pytest.raises(UserError, match="expected one of torchrun"):
        call(render, RECIPE, "--target", "kubernete")
