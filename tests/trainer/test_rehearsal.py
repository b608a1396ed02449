"""The checkpoint that is tried out before the first step: it changes nothing that is learnt, and what cannot work is
said at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.run.control import read_outcomes
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.run.rehearsal import read_rehearsal
from launcher.trainer.metrics import read_metrics
from tests.ranks import run_ranks
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


def ends(rank: int, world_size: int, path: str, attempt: int, how: str) -> str:
    """Run a rank in which the rehearsal meets that; the class of what it ends with, and its words."""
    import resource

    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.main import run_rank

    read_back, reserve, limit = (
        CheckpointManager.read_back, CheckpointManager.reserve, resource.getrlimit(resource.RLIMIT_AS)
    )  # fmt: skip

    def after_a_flipped_bit(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if rank == 0:
            file = RunDirectory(path).checkpoints / name / "rank-00001.safetensors"
            data = bytearray(file.read_bytes())
            data[-9] ^= 4
            file.write_bytes(data)
        return read_back(self, name, *args, **kwargs)

    def short_of_memory(self: Any, num_bytes: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), limit[1]))
        try:
            reserve(self, num_bytes)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)

    try:
        if how == "flip":
            CheckpointManager.read_back = after_a_flipped_bit  # type: ignore[method-assign]
        if how == "memory" and rank == world_size - 1:
            CheckpointManager.reserve = short_of_memory  # type: ignore[method-assign]
        run_rank(path, attempt)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        CheckpointManager.read_back, CheckpointManager.reserve = read_back, reserve  # type: ignore[method-assign]
    return "trained"


def met(run: Any, how: str = "", *, ranks: int = 2) -> str:
    """What every rank of an attempt says; nothing was trained, and nothing is left."""
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    said = set(run_ranks(ends, ranks, str(run.path), attempt, how))
    assert len(said) == 1, said
    assert not run.metrics_file.exists() or not run.metrics_file.read_text()
    assert list(run.checkpoints.iterdir()) == []
    return said.pop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=100k", ["No space left on device", "It takes 291 KiB, ", " are free", "choose another run.dir"]),
        ("ro", ["Read-only file system", "mounted read-only. Mount it for writing"]),
    ],
)
def test_a_file_system_that_takes_no_checkpoint_ends_the_run_before_its_first_step(
    tmp_path: Path, options: str, words: list[str]
) -> None:
    run = make.make_run(tmp_path, make.make_recipe("ddp"), evaluation=False)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(run.checkpoints)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        said = met(run)
    finally:
        subprocess.run(["umount", "-l", str(run.checkpoints)], check=True)
    assert said.startswith("UserError: no checkpoint can be written to ")
    assert all(word in said for word in words), said
    assert {outcome.failure_class for outcome in read_outcomes(run, 1).values()} == {"user"}


def test_storage_that_loses_data_is_named_with_the_file(tmp_path: Path) -> None:
    run = make.make_run(tmp_path, make.make_recipe("fsdp2"), evaluation=False)
    said = met(run, "flip")
    assert said.startswith("SaveError: ")
    assert "rank-00001.safetensors: its content has changed" in said
    assert "loses data: use another one. Nothing was trained yet." in said
    assert {outcome.failure_class for outcome in read_outcomes(run, 1).values()} == {"node"}


def test_a_host_without_room_for_the_copy_says_how_much_it_takes(tmp_path: Path) -> None:
    config = {**make.LLAMA, "intermediate_size": 8192}
    run = make.make_run(tmp_path, make.make_recipe("ddp", config=config), evaluation=False)
    said = met(run, "memory")
    assert said.startswith("UserError: checkpoint.async_save = true: expected host memory for a copy ")
    assert "2 x 9." in said
    assert "Use checkpoint.async_save=false" in said
