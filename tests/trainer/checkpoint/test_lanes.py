"""Lanes of a stream in a checkpoint: kept bit by bit, found by whoever owns them next, covered by the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.trainer.checkpoint.format import CheckpointError, stream_file
from launcher.trainer.checkpoint.lanes import check_lanes, read_lanes
from launcher.trainer.checkpoint.manager import CheckpointManager
from launcher.trainer.checkpoint.reader import read_manifest
from tests.trainer.checkpoint import rigs


def lanes(numbers: Any, *, seed: int = 0) -> dict[int, dict[str, Any]]:
    random = np.random.default_rng(seed)
    return {
        number: {
            "tokens": random.integers(0, 1000, 11 + number, dtype=np.int32), "taken": random.random(2),
            "weights": np.ones(3 + number, np.uint8), "empty": np.zeros((0, 6), np.int64),
        }
        for number in numbers
    }  # fmt: skip


def lanes_manager(run: Any, attempt: int) -> CheckpointManager:
    manager = rigs.manager(run, attempt)
    manager.meta["stream_of"] = "web"
    return manager


def save(path: Path, step: int, found: Any) -> tuple[CheckpointManager, rigs.FlatEngine]:
    run, attempt = rigs.begin(path)
    manager, engine = lanes_manager(run, attempt), rigs.FlatEngine(torch.nn.Linear(4, 2))
    manager.save(step, engine, {"step": step}, lanes=lambda: found)
    assert manager.wait().state == "done"
    return manager, engine


def test_lanes_are_read_back_bit_by_bit_by_the_ranks_that_want_them(tmp_path: Path) -> None:
    written = lanes(range(5))
    manager, engine = save(tmp_path, 3, written)
    assert manager.load_lanes([1], of="web") is None  # nothing was loaded
    manager.load_latest(engine)
    assert manager.load_lanes([1], of="other files") is None
    for wanted in ([0], [1, 4], range(5)):
        found = manager.load_lanes(list(wanted), of="web")
        assert found is not None
        assert set(found) == set(wanted)
        for lane in wanted:
            for name, array in written[lane].items():
                assert found[lane][name].dtype == array.dtype
                assert found[lane][name].tobytes() == array.tobytes()
    with pytest.raises(CheckpointError, match=r"holds no state of the lanes \[7\]"):
        manager.load_lanes([2, 7], of="web")


def test_l7_a_bit_flipped_in_a_file_of_lanes_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    manager, engine = save(tmp_path, 3, lanes(range(2), seed=1))
    run, attempt = manager.run, manager.attempt
    manager.save(4, engine, {"step": 4}, lanes=lambda: lanes(range(2), seed=2))
    assert manager.wait().state == "done"
    path = run.checkpoint(4, attempt) / stream_file(0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    later = lanes_manager(*rigs.begin(tmp_path))
    assert later.load_latest(engine) == {"step": 3}
    assert f"{stream_file(0)}: its content has changed" in later.problems[0]
    found = later.load_lanes([1], of="web")
    assert found is not None
    assert found[1]["tokens"].tobytes() == lanes(range(2), seed=1)[1]["tokens"].tobytes()


def test_a_checkpoint_without_lanes_says_which_are_missing(tmp_path: Path) -> None:
    manager, engine = save(tmp_path, 3, {})
    manager.load_latest(engine)
    with pytest.raises(CheckpointError, match=r"lanes \[0, 1\]"):
        manager.load_lanes([0, 1], of="web")
    folder = manager.run.checkpoint(3, manager.attempt)
    assert "stream" not in read_manifest(folder)
    assert read_lanes(folder, read_manifest(folder), []) == {}


def test_lanes_that_are_missing_or_there_twice_are_never_committed() -> None:
    check_lanes([{"lanes": [1, 3]}, {"lanes": [0, 2]}])
    for wrong in ([{"lanes": [0, 2]}], [{"lanes": [0, 1]}, {"lanes": [1]}]):
        with pytest.raises(CheckpointError, match="expected each once"):
            check_lanes(wrong)
