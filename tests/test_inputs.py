"""Data sets and a tokenizer that nobody here wrote: each is recognised, prepared, shown and, where it can be, learnt.

The folder is named by LAUNCHER_TEST_INPUTS; without it these checks are skipped. Beside a file by itself, each entry of
LLaMA-Factory's registry whose file is there is read by its name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data.page import page
from launcher.data.prepare import Prepared, prepare
from launcher.data.preview import preview
from launcher.data.stats import statistics
from launcher.errors import UserError
from launcher.recipe.check import load
from launcher.recipe.schema import Recipe

INPUTS = Path(os.environ.get("LAUNCHER_TEST_INPUTS", "/nowhere"))
REGISTRY = INPUTS / "llamafactory" / "dataset_info.json"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INPUTS.is_dir(), reason="LAUNCHER_TEST_INPUTS names no folder of real inputs"),
]

CHATS = {  # file -> the format that auto recognises
    "llamafactory/identity.json": "alpaca",
    "llamafactory/alpaca_en_demo.json": "alpaca",
    "llamafactory/alpaca_zh_demo.json": "alpaca",
    "llamafactory/glaive_toolcall_en_demo.json": "sharegpt",
    "llamafactory/c4_demo.jsonl": "text",
    "torchtune/alpaca_tiny.json": "alpaca",
    "torchtune/chat_tiny.json": "sharegpt",
    "torchtune/instruct_tiny.json": "query_response",
}
PAIRS = {
    "llamafactory/dpo_en_demo.json": "preference",
    "llamafactory/kto_en_demo.json": "unpaired",
    "torchtune/hh_rlhf_tiny.json": "preference",
    "torchtune/stack_exchange_paired_tiny.json": "preference",
}
SIDES = {"preference": {"chosen", "rejected"}, "unpaired": {"good", "bad"}}


def entries() -> list[str]:
    """Names of the registry whose file is here."""
    if not REGISTRY.is_file():
        return []
    registry = json.loads(REGISTRY.read_text())
    return [name for name, e in registry.items() if "file_name" in e and (REGISTRY.parent / e["file_name"]).exists()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def write(folder: Path, *sources: dict[str, Any], **changes: Any) -> Path:
    """A recipe of these sources, for a random Llama of a few thousand parameters."""
    recipe = {
        "model": {
            "config": {
                "model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 2048,
            },
            "tokenizer": str(INPUTS / "torchtune" / "tiny_bpe_tokenizer.json"),
        },
        "data": {
            "train": list(sources), "seq_len": 2048, "overlong": "truncate", "chat_template": "chatml",
            "placeholders": {"name": "Ada", "author": "Grace"}, "cache_dir": str(folder / "cache"), "num_workers": 1,
        },
        "train": {"global_batch_size": 4, "max_steps": 20},
        "optimizer": {"lr": 3e-3},
        "run": {"dir": str(folder / "runs")},
        **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def prepared(folder: Path, **source: Any) -> tuple[Recipe, Prepared]:
    recipe = load(write(folder, source)).recipe
    return recipe, prepare(recipe)


def looked_at(recipe: Recipe, found: Prepared) -> set[str]:
    """Sides of what is shown; every way of looking works, and something is trained."""
    shown = preview(recipe, found, rows=2)
    documents = [document for row in shown["rows"] for document in row["documents"]]
    assert any(token["trained"] for document in documents for token in document["tokens"])
    assert page(shown, name="inputs").count("<article ") == len(documents)
    counts = statistics(recipe, found)["train"]
    assert sum(counts["histogram"]["documents"]) >= counts["documents"] > 0
    return {document["side"] for document in documents}


@pytest.mark.parametrize(("file", "format"), {**CHATS, **PAIRS}.items())
def test_a_file_is_recognised_prepared_and_shown(folder: Path, file: str, format: str):
    recipe, found = prepared(folder, path=str(INPUTS / file))
    assert f"recognised as {format}" in found.train["formats"][0]
    assert looked_at(recipe, found) <= SIDES.get(format, {"plain"})


@pytest.mark.parametrize("name", [name for name in entries() if not name.startswith("mllm")])
def test_an_entry_of_the_registry_is_the_same_data_as_its_file(folder: Path, name: str):
    recipe, by_name = prepared(folder, path=f"{REGISTRY}#{name}")
    looked_at(recipe, by_name)
    file = json.loads(REGISTRY.read_text())[name]["file_name"]
    _, by_file = prepared(folder, path=str(REGISTRY.parent / file))
    for count in ("documents", "groups"):
        assert by_name.train[count] == by_file.train[count]


@pytest.mark.parametrize("path", ["llamafactory/mllm_demo.json", "llamafactory/dataset_info.json#mllm_demo"])
def test_images_are_refused_in_words(folder: Path, path: str):
    with pytest.raises(UserError, match="image"):
        prepared(folder, path=str(INPUTS / path))


def launcher(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)


def test_a_mix_of_all_of_them_is_learnt_for_20_steps(folder: Path):
    sources = [{"path": str(INPUTS / file)} for file in CHATS]
    path = write(folder, *sources, run={"dir": str(folder / "runs"), "name": "mix"})
    ended = launcher(folder, "run", path.name, "data.seq_len=512")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "runs" / "mix" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert {name for line in lines for name in line.get("mix", {})} >= {"identity", "c4_demo"}


def test_pairs_and_labelled_answers_are_not_learnt_yet_and_run_says_so(folder: Path):
    ended = launcher(folder, "run", write(folder, *({"path": str(INPUTS / file)} for file in PAIRS)).name)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "objective" in ended.stderr
