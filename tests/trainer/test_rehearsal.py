"""The checkpoint that is tried out before the first step: it changes nothing that is learnt, and what cannot work is
said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.run.ledger import valid_checkpoints
from launcher.run.rehearsal import read_rehearsal
from launcher.trainer.metrics import read_metrics
from tests.trainer import make

pytestmark = pytest.mark.gloo
LORA = {"adapter__kind": "lora", "adapter__rank": 4, "adapter__dropout": 0.1}


def tensors(file: Path) -> dict[str, bytes]:
    """Each stored range and its bytes."""
    from safetensors.numpy import load_file

    return {key: array.tobytes() for key, array in load_file(file).items()}


def learnt(folder: Path, kind: str, *, rehearse: bool, ranks: int, **changes: Any) -> tuple[Any, ...]:
    """(losses by step, hashes of the files of the last checkpoint, what was rehearsed) of a run."""
    recipe = make.make_recipe(kind, checkpoint__rehearse=rehearse, **changes)
    run = make.make_run(folder / str(rehearse), recipe, total_steps=3, evaluation=False)
    assert make.run_attempt(run, ranks) == [("finished", 3)] * ranks
    (last,) = valid_checkpoints(run)
    assert last.step == 3
    assert [path.name for path in run.checkpoints.iterdir()] == [last.path.name]
    manifest = json.loads((last.path / "manifest.json").read_text())
    lines = read_metrics(run.metrics_file)[0]
    return (
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
        manifest["trainer_state"],
        read_rehearsal(run),
        [tensors(last.path / record["file"]) for record in manifest["files"]],
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ddp", {}),
        ("fsdp2", {"checkpoint__async_save": False}),
        ("zero1", {"train__precision": "bf16"}),
        ("zero2", {}),
        ("zero3", {"strategy__zero__param_persistence_threshold": 1000}),
        ("ddp", {"train__precision": "fp16"}),
        ("fsdp2", LORA),
        ("zero3", LORA),
    ],
)
def test_a_rehearsed_run_learns_bit_for_bit_what_one_without_does(tmp_path: Path, kind: str, changes: Any) -> None:
    with_it, without = (learnt(tmp_path, kind, rehearse=flag, ranks=2, **changes) for flag in (True, False))
    assert with_it[:2] == without[:2]
    assert with_it[3] == without[3]
    assert without[2] is None
    found = with_it[2]
    assert (found.world_size, found.attempt) == (2, 1)
    assert found.bytes > 0
    assert 0 < found.blocked_s <= found.durable_s < 60
    print(found)
