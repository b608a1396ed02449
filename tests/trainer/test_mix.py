"""A mix of three sources and two evaluation sets on real ranks: laws, figures, and what is said of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.mix import Mix
from launcher.data.store import Store
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt
from launcher.trainer.metrics import read_metrics
from tests.ranks import run_ranks
from tests.trainer import make

STEPS, ROWS = 8, 6
SOURCES = {"large": (60, 30), "small": (12, 20), "rare": (25, 10)}  # documents, rows in an epoch


def mixed_run(folder: Path, *, total_steps: int = STEPS) -> RunDirectory:
    """A run over three sources, of which the small one comes round several times in an epoch."""
    run = make.make_run(folder, make.make_recipe("ddp", train__global_batch_size=ROWS), total_steps=total_steps)
    data = json.loads(run.data_file.read_text())
    entries = []
    for name, (count, rows) in SOURCES.items():
        path = make.documents_store(folder / name, count=count)
        entries.append({"name": name, "store": str(path), "rows": Store.open(path).rows, "epoch_rows": rows})
    data["train"] = {"sources": entries}
    data["eval"] = {"sets": entries[1:]}
    run.data_file.write_text(json.dumps(data))
    return run


def lengthen(run: RunDirectory, steps: int) -> RunDirectory:
    run.data_file.write_text(json.dumps({**json.loads(run.data_file.read_text()), "total_steps": steps}))
    return run


def said_by(run: RunDirectory, world_size: int) -> str:
    """What rank 0 prints in one attempt; its server's own output is where the first test of the process left it."""
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    file = run.path / "said.txt"
    run_ranks(rank_with_output, world_size, str(run.path), attempt, str(file))
    return file.read_text()


def rank_with_output(rank: int, world_size: int, path: str, attempt: int, file: str) -> None:
    """A rank of a run; rank 0 prints into a file."""
    if rank:
        make.rank_of_run(rank, world_size, path, attempt)
        return
    with open(file, "w") as out, contextlib.redirect_stdout(out):
        make.rank_of_run(rank, world_size, path, attempt)


def figures(run: RunDirectory, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in read_metrics(run.metrics_file)[0]}


@pytest.mark.gloo
@pytest.mark.slow
def test_l3_l4_l5_hold_over_a_mix_and_its_figures_tell_each_source_and_set(tmp_path):
    whole = mixed_run(tmp_path / "whole")
    said = said_by(whole, 2)
    cut = mixed_run(tmp_path / "cut", total_steps=3)
    make.run_attempt(cut, 2)
    shutil.copytree(tmp_path / "cut", tmp_path / "fewer")
    make.run_attempt(lengthen(cut, STEPS), 2)
    assert figures(cut, "loss") == figures(whole, "loss")  # L4: bit for bit
    fewer = lengthen(RunDirectory(tmp_path / "fewer" / "run"), STEPS)
    make.run_attempt(fewer, 1)
    for step, loss in figures(whole, "loss").items():  # L3 and L5: one rank as two
        assert figures(fewer, "loss")[step] == pytest.approx(loss, rel=1e-5)
    _check_mix(whole)
    _check_evaluations(whole)
    assert "mix of the " in said
    assert "evaluation loss" in said
    assert "(small " in said


def _check_mix(run: RunDirectory) -> None:
    """Each line's shares are those of the rows that the mix gives for that step."""
    mix = Mix.open(json.loads(run.data_file.read_text())["train"])
    for step, shares in figures(run, "mix").items():
        rows = mix.global_batch(step - 1, seed=5, global_batch_size=ROWS)
        tokens = mix.tokens_of_sources(rows)
        assert shares == pytest.approx(dict(zip(SOURCES, tokens / tokens.sum(), strict=True)))


def _check_evaluations(run: RunDirectory) -> None:
    """A loss for each set, and one over all tokens of all sets."""
    sets = json.loads(run.data_file.read_text())["eval"]["sets"]
    weights = np.array([float(Store.open(entry["store"]).row_weight.sum()) for entry in sets])
    (evaluation,) = read_metrics(run.metrics_file)[1]
    losses = np.array([evaluation[f"eval_loss/{entry['name']}"] for entry in sets])
    assert losses[0] != losses[1]
    assert evaluation["eval_loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()))


def test_a_tracker_gets_each_share_and_each_set_as_a_number_of_its_own():
    from launcher.trainer.trackers import scalars

    values = {"loss": 1.0, "mix": {"a": 0.25, "b": 0.75}, "eval_loss/a": 2.0, "mfu": None}
    numbers = dict(pair for key, value in values.items() for pair in scalars(key, value))
    assert numbers == {"loss": 1.0, "mix/a": 0.25, "mix/b": 0.75, "eval_loss/a": 2.0}
