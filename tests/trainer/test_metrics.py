"""Figures: read back by step, drawn, sent to trackers, counted as published rows count them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from launcher.trainer.metrics import (
    MetricsWriter,
    console_line,
    flops_per_step,
    memory_gib,
    peak_flops,
    plot_loss,
    read_metrics,
)


def test_the_last_line_of_a_step_counts_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.0), (2, 2.4), (3, 2.3)):
        writer.write({"step": step, "loss": loss})
    writer.write({"step": 3, "eval_loss": 2.2})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    steps, evaluations = read_metrics(path)
    assert [(s["step"], s["loss"]) for s in steps] == [(1, 3.0), (2, 2.4), (3, 2.3)]
    assert evaluations == [{"step": 3, "eval_loss": 2.2}]


def test_lines_that_a_full_disk_does_not_take_wait_and_follow_whole_the_oldest_lost_beyond_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource
    import signal

    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = MetricsWriter(path, limit=3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (35, hard))  # in the middle of the second line; then writes raise
        for step in range(1, 8):
            writer.write({"step": step, "loss": 1.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.stat().st_size == 35
    writer.write({"step": 8, "loss": 1.5})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 6, 7, 8]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written (File too large). Training goes on") == 1
    assert "3 lines could not be written and are lost" in said


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 1}\n{"st'])
def test_the_part_of_a_line_that_a_kill_left_is_cut_off_by_the_next_attempt(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(torn)
    writer = MetricsWriter(path)
    writer.write({"step": 2})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}] * torn.count("\n") + [
        {"step": 2}
    ]


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])


def test_the_picture_is_a_png_also_where_a_loss_was_not_finite(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.0},
        {"step": 3, "eval_loss": 2.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="a run")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_flops_of_llama_3_8b_at_8192_are_those_of_published_rows_and_less_beside_an_adapter() -> None:
    """NVIDIA's rows divide to 51.48 GFLOP a token: 45.03 for the matrices, 6.44 for causal attention."""
    config = SimpleNamespace(
        num_hidden_layers=32, num_attention_heads=32, head_dim=128, hidden_size=4096, tie_word_embeddings=False
    )
    config.get_text_config = lambda: config
    embedding = nn.Embedding(128_256, 4096, device="meta")
    body = nn.Linear(8_030_261_248 - embedding.weight.numel(), 1, bias=False, device="meta")
    lm = SimpleNamespace(config=config, get_input_embeddings=lambda: embedding)
    module = nn.Module()
    module.lm, module.embedding, module.body = lm, embedding, body
    assert flops_per_step(module, tokens=8192, cost=8192**2) / 8192 == pytest.approx(51.47e9, rel=1e-3)

    module.adapter = nn.Linear(20_000_000, 1, bias=False, device="meta")
    body, embedding = module.body.requires_grad_(False), embedding.requires_grad_(False)
    frozen = nn.Module()
    frozen.lm, frozen.embedding, frozen.body, frozen.adapter = lm, embedding, body, module.adapter
    expected = 4 * body.weight.numel() + 6 * 20_000_000 + 6.44e9
    assert flops_per_step(frozen, tokens=8192, cost=8192**2) / 8192 == pytest.approx(expected, rel=1e-3)


def test_a_cpu_has_no_known_peak_but_memory() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert 0.01 < memory_gib(torch.device("cpu")) < 1000


def test_a_console_line_says_step_loss_rate_and_speed() -> None:
    values = {"step": 12, "loss": 3.21, "lr": 2e-4, "grad_norm": 1.234, "tokens_per_s": 1234.0, "mfu": None}
    assert console_line(values, total_steps=400) == "step 12/400  loss 3.2100  lr 2.0e-04  norm 1.23  1.2k tok/s"
    assert console_line({**values, "mfu": 0.4, "loss": math.nan}, total_steps=400).endswith("mfu 40.0%")
