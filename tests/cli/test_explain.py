"""`launcher render --explain`: every setting of the engine, and why it is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli.render import command

RECIPE = str(Path(__file__).parents[2] / "recipes" / "tiny-cpu.yaml")


def render(*arguments: str) -> str:
    return CliRunner().invoke(command, [RECIPE, *arguments], catch_exceptions=False).stdout


@pytest.mark.parametrize(
    ("strategy", "file"),
    [("ddp", "ddp.json"), ("fsdp2", "fsdp2.json"), ("zero1", "deepspeed.json"), ("zero3-offload", "deepspeed.json")],
)
def test_each_value_of_the_file_is_printed_with_its_reason(strategy, file):
    values = json.loads(json.loads(render(f"strategy={strategy}", "--json"))["files"][file])
    lines = render(f"strategy={strategy}", "--explain").splitlines()
    assert lines[0] == f"==> {file} <=="
    explained = [line.split("  ", 1) for line in lines[1:] if line]
    assert len(explained) == count(values)
    assert all(rest.strip() for _, rest in explained)


def count(values) -> int:
    return sum(count(value) if isinstance(value, dict) else 1 for value in values.values())


def test_a_key_that_was_laid_over_says_where_it_comes_from():
    changed = "strategy.deepspeed.zero_optimization.stage3_max_reuse_distance=7"
    line = next(x for x in render("strategy=zero3", changed, "--explain").splitlines() if "max_reuse_distance" in x)
    assert line.split() == ["zero_optimization.stage3_max_reuse_distance", "7", "strategy.deepspeed"]


def test_the_file_of_accelerate_is_explained_with_its_target():
    text = render("strategy=zero2", "--target", "accelerate", "--explain")
    assert "==> deepspeed.json <==" in text
    assert "==> accelerate.yaml <==" in text
    assert "==> job.sh <==" not in text


def test_explain_as_json_stands_beside_the_files(tmp_path):
    shown = json.loads(render("strategy=zero2", "--explain", "--json", "-o", str(tmp_path)))
    explained = shown["explain"]["deepspeed.json"]
    assert explained["zero_optimization.stage"] == {"value": 2, "reason": "strategy.kind = zero2"}
    assert json.loads((tmp_path / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert "explain" not in json.loads(render("strategy=zero2", "--json"))
