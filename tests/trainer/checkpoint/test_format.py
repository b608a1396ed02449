"""Pieces, shares of replicas, files and random access, without processes."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors
import torch
from hypothesis import given, settings

from launcher.trainer.checkpoint.format import (
    CheckpointError,
    HostBuffer,
    Piece,
    rank_file,
    share_replicas,
    take_snapshot,
    write_file,
)  # fmt: skip
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from tests.trainer.checkpoint import rigs


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    replicas=st.integers(1, 5),
    wide=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_replicas_together_write_each_element_once_and_about_equally_much(lengths, replicas, wide):
    tensors = [
        torch.arange(length, dtype=torch.float32 if is_wide else torch.bfloat16)
        for length, is_wide in zip(lengths, wide, strict=False)
    ]
    seen = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    sizes = []
    for replica in range(replicas):
        pieces = [Piece(str(i), "value", 0, tensor, replica, replicas) for i, tensor in enumerate(tensors)]
        mine = list(share_replicas(pieces))
        sizes.append(sum(piece.tensor.numel() * piece.tensor.element_size() for piece in mine))
        for piece in mine:
            end = piece.start + piece.tensor.numel()
            seen[int(piece.name)][piece.start : end] += 1
            assert torch.equal(piece.tensor, tensors[int(piece.name)][piece.start : end])
    assert all(bool((count == 1).all()) for count in seen)
    assert max(sizes) - min(sizes) <= 8


def test_a_file_is_plain_safetensors_whatever_the_types(tmp_path: Path):
    module = rigs.OddShapes()
    snapshot = take_snapshot(rigs.FlatEngine(module).pieces(), {"rank": "0"}, HostBuffer())
    write_file(tmp_path / rank_file(0), snapshot)
    with safetensors.safe_open(tmp_path / rank_file(0), framework="pt") as file:
        assert file.metadata() == {"rank": "0"}
        assert torch.equal(file.get_tensor("low|value|0"), module.low.detach().view(-1))
        assert torch.equal(file.get_slice("wide|value|0")[5:9], module.wide.detach().view(-1)[5:9])
        assert file.get_tensor("counter|value|0").dtype == torch.int64


def test_a_copy_in_the_buffer_and_the_live_state_give_the_same_bytes(tmp_path: Path):
    engine, buffer = rigs.FlatEngine(rigs.OddShapes()), HostBuffer()
    copied = write_file(tmp_path / "a", take_snapshot(engine.pieces(), {}, buffer))
    live = write_file(tmp_path / "b", take_snapshot(engine.pieces(), {}, None))
    assert (copied.bytes, copied.xxh3_128) == (live.bytes, live.xxh3_128)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_host_buffer_is_kept_from_save_to_save():
    engine, buffer = rigs.FlatEngine(rigs.OddShapes()), HostBuffer()
    (first,) = take_snapshot(engine.pieces(), {}, buffer).ranges()
    (second,) = take_snapshot(engine.pieces(), {}, buffer).ranges()
    assert first.data_ptr() == second.data_ptr()


def test_a_snapshot_does_not_change_when_training_goes_on(tmp_path: Path):
    engine = rigs.FlatEngine(rigs.OddShapes())
    snapshot = take_snapshot(engine.pieces(), {}, HostBuffer())
    before = write_file(tmp_path / "before", snapshot)
    engine.disturb(9)
    assert write_file(tmp_path / "after", snapshot).xxh3_128 == before.xxh3_128


@pytest.mark.parametrize("writers", [1, 3, 4])
def test_what_some_ranks_wrote_any_other_number_reads_bit_by_bit(tmp_path: Path, writers: int):
    run, attempt = rigs.begin(tmp_path)
    module = rigs.OddShapes(seed=3)
    assert rigs.save_with_ranks(run, attempt, 5, [module] * writers) == [""] * writers
    folder = run.checkpoint(5, attempt)
    reader = Reader(folder, read_manifest(folder, run_id="this-run"))
    for readers in (1, 2, 3, 5, 7):
        fresh = rigs.OddShapes(seed=8)
        for rank in range(readers):
            for piece in rigs.FlatEngine(fresh, rank=rank, world_size=readers).pieces():
                if piece.kind == "value":
                    reader.read_into(piece.name, piece.kind, piece.start, piece.tensor)
        assert rigs.same(dict(fresh.state_dict()), dict(module.state_dict()))


def test_reading_what_is_not_there_is_an_error(tmp_path: Path):
    run, attempt = rigs.begin(tmp_path)
    rigs.save_with_ranks(run, attempt, 1, [rigs.OddShapes()])
    folder = run.checkpoint(1, attempt)
    reader = Reader(folder, read_manifest(folder))
    with pytest.raises(CheckpointError, match="holds no wide momentum"):
        reader.read_into("wide", "momentum", 0, torch.empty(3))
    with pytest.raises(CheckpointError, match=r"holds no long value\[250:260\]"):
        reader.read_into("long", "value", 250, torch.empty(10))


def test_stored_types_convert_on_reading(tmp_path: Path):
    run, attempt = rigs.begin(tmp_path)
    module = rigs.OddShapes()
    rigs.save_with_ranks(run, attempt, 1, [module] * 2)
    folder = run.checkpoint(1, attempt)
    out = torch.empty(39)
    Reader(folder, read_manifest(folder)).read_into("low", "value", 0, out)
    assert torch.equal(out, module.low.detach().float().view(-1))


def test_loading_into_a_narrower_type_is_said_and_into_an_equal_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run, attempt = rigs.begin(tmp_path)
    stored = rigs.FlatEngine(torch.nn.Linear(5, 3))
    rigs.saved(rigs.manager(run, attempt), 1, stored)
    rigs.manager(run, attempt).load_latest(rigs.FlatEngine(torch.nn.Linear(5, 3)))
    assert not caplog.records
    narrow = torch.nn.Linear(5, 3).bfloat16()
    rigs.manager(run, attempt).load_latest(rigs.FlatEngine(narrow))
    said = "step-00000001-a1: 2 parameters are wider there than this engine keeps them; they are rounded"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert torch.equal(narrow.weight, stored.module.weight.bfloat16())
