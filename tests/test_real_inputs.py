"""Datasets and a tokenizer that nobody here wrote go through prepare, preview and 20 steps on 2 ranks.

The folder is named by LAUNCHER_TEST_INPUTS; without it these checks are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.shipped import folder

INPUTS = os.environ.get("LAUNCHER_TEST_INPUTS")
pytestmark = [
    pytest.mark.gloo,
    pytest.mark.skipif(not INPUTS, reason="LAUNCHER_TEST_INPUTS names no folder of real inputs"),
]

CASES = {
    "identity": ("llamafactory/identity.json", "alpaca", "sft"),
    "alpaca_en_demo": ("llamafactory/alpaca_en_demo.json", "alpaca", "sft"),
    "c4_demo": ("llamafactory/c4_demo.jsonl", "text", "pretrain"),
    "chat_tiny": ("torchtune/chat_tiny.json", "sharegpt", "sft"),
}


def launcher(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "launcher", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{arguments}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("name", CASES)
def test_a_real_dataset_prepares_previews_and_trains_20_steps_on_2_ranks(name: str, tmp_path: Path):
    assert INPUTS is not None
    file, format, objective = CASES[name]
    recipe = {
        "model": {
            "config": {
                "model_type": "llama", "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            },
            "tokenizer": f"{INPUTS}/torchtune/tiny_bpe_tokenizer.json",
        },
        "objective": {"kind": objective},
        "data": {
            "train": [{"path": f"{INPUTS}/{file}"}], "seq_len": 512, "overlong": "truncate",
            "chat_template": str(folder("recipes") / "chat_templates" / "chatml.jinja"), "cache_dir": "cache",
        },
        "train": {"global_batch_size": 4, "max_steps": 20},
        "optimizer": {"lr": 1e-3},
        "strategy": {"kind": "fsdp2"},
        "cluster": {"nproc_per_node": 2},
    }  # fmt: skip
    if objective == "pretrain":
        del recipe["data"]["chat_template"]
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))

    prepared = json.loads(launcher(tmp_path, "prepare", path.name, "--json"))
    assert prepared["train"]["documents"] > 0
    shown = json.loads(launcher(tmp_path, "preview", path.name, "-n", "2", "--json"))
    tokens = [token for row in shown["rows"] for document in row["documents"] for token in document["tokens"]]
    assert any(token["trained"] for token in tokens)
    assert any(format in said for said in prepared["train"]["formats"])
    launcher(tmp_path, "run", path.name)
    metrics = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
