"""Faults of the numbers: poisoned batches, NaN on one rank, flipped bits in a rank's memory, random numbers."""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from launcher.cli import status
from launcher.data.batches import Batches
from launcher.data.packing import pack
from launcher.data.store import Encoded, Index, write_part, write_store
from launcher.jobs.console import Console
from launcher.jobs.supervisor import launch
from launcher.recipe.check import load
from launcher.recipe.schema import Recipe
from launcher.run.control import clear_stop, read_outcomes
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, start_attempt, valid_checkpoints
from launcher.run.left_out import left_out
from launcher.run.summary import summarise
from launcher.trainer.metrics import read_metrics
from tests.jobs.make import project, run_of, tensors_of
from tests.ranks import run_ranks
from tests.trainer import make
from tests.trainer.test_loop import rank_that_is_stopped
from tests.trainer.test_stream import streaming_run

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

KINDS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
TOO_LARGE = 3e38  # of a weight: times the loss of a token it is no finite fp32 number
HEAVY = 1000.0  # a weight with which one document is the loss of its batch
Poison = dict[int, float]  # step, from 1 -> weight of the tokens of one document of its global batch


def data_with(folder: Path, recipe: Recipe, poison: Poison, *, steps: int) -> dict[int, int]:
    """A store of documents that are easily learnt, one of them in each poisoned step's batch of absurd tokens.

    Returns:
        The record of the poisoned document, by step.
    """
    chance = np.random.default_rng(3)
    lengths = chance.integers(20, 32, 3 * steps * recipe.train.global_batch_size)  # no row comes twice
    records: dict[int, int] = {}
    for again in range(2):  # which step has which documents, is known when they are packed
        encoded, heavy = Encoded(), {record: poison[step] for step, record in records.items()}
        for record, length in enumerate(lengths):
            tokens = (chance.integers(8) + np.arange(length)) % 8 + 1
            weight = heavy.get(record, 1.0)
            if record in heavy:
                tokens = chance.integers(40, make.VOCAB, length)
            encoded.add(tokens.astype(np.uint32), np.full(length, weight, np.float32), file=0, record=record)
        shutil.rmtree(folder / "store", ignore_errors=True)
        path = folder / "store" / "packed"
        write_part(folder / "store" / "tokens", encoded, vocab_size=make.VOCAB)
        write_store(
            path, parts=[folder / "store" / "tokens"], files=["made.jsonl"],
            index=Index.gather([folder / "store" / "tokens"]), packings=[pack(lengths, 64)], seq_len=64,
            meta={"key": f"made-{again}", "vocab_size": make.VOCAB},
        )  # fmt: skip
        batches: Batches = make.batches(path, recipe, rank=0, world_size=1, total_steps=steps)
        records = {step: batches.records(step - 1)["made.jsonl"][0] for step in poison}
    return records


def make_run(folder: Path, recipe: Recipe, poison: Poison, *, steps: int) -> RunDirectory:
    """A run over such data."""
    data_with(folder, recipe, poison, steps=steps)
    return make.make_run(folder, recipe, total_steps=steps, evaluation=False)


def start(run: RunDirectory) -> int:
    return start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")


def twin(run: RunDirectory, folder: Path) -> RunDirectory:
    """The run as it was before its first attempt, elsewhere, over the same data."""
    shutil.copytree(run.path, folder)
    return RunDirectory(folder)


def rank_of_runs(rank: int, world_size: int, runs: Sequence[tuple[str, int, Callable[[int], None] | None]]) -> Any:
    """One attempt of each run; what it raised, as (name, text), or None. A fault, if given, is called with each step
    before its forward pass."""
    import launcher.trainer.loop as loop
    from launcher.trainer.main import run_rank

    original, found = loop.accumulate, []
    for path, attempt, fault in runs:

        def with_fault(t: Any, rows: Any, fault: Any = fault) -> Any:
            if fault is not None:
                fault(t)
            return original(t, rows)

        loop.accumulate = with_fault  # type: ignore[assignment]
        try:
            run_rank(path, attempt)
            found.append(None)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        finally:
            loop.accumulate = original
    return found


def attempt_of(runs: Sequence[RunDirectory], *, ranks: int = 2, fault: Any = None) -> list[list[Any]]:
    """One attempt of each run in the same ranks; what each raised: [run][rank]."""
    numbers = [start(run) for run in runs]
    started = [(str(run.path), number, fault) for run, number in zip(runs, numbers, strict=True)]
    by_rank = run_ranks(rank_of_runs, ranks, started, timeout_s=600)
    return [list(of_run) for of_run in zip(*by_rank, strict=True)]


def losses(run: RunDirectory) -> dict[int, float | None]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


def line_of(run: RunDirectory, step: int) -> dict[str, Any]:
    return next(line for line in read_metrics(run.metrics_file)[0] if line["step"] == step)


def trainer_state(run: RunDirectory) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((valid_checkpoints(run)[-1].path / "manifest.json").read_text())["trainer_state"]
    return state


def newest(run: RunDirectory) -> Any:
    return tensors_of(valid_checkpoints(run)[-1].path)


def recipe_of(kind: str = "ddp", **changes: Any) -> Recipe:
    return make.make_recipe(
        kind, **{"checkpoint__every_steps": 100, "checkpoint__rehearse": False, "optimizer__lr": 1e-2, **changes}
    )


# F28: random numbers


def with_other_generators(rank: int, world_size: int, path: str, attempt: int) -> None:
    """Run a rank whose generators stand anywhere, as after a restore that found no file of theirs, or another's."""
    import torch

    from launcher.trainer.main import run_rank

    torch.manual_seed(991 * rank + 7)
    np.random.seed(rank)
    random.seed(rank)
    torch.rand(1234)
    run_rank(path, attempt)


def what_a_rank_prints(rank: int, world_size: int, path: str, attempt: int) -> str:
    import contextlib
    import io

    from launcher.trainer.main import run_rank

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_rank(path, attempt)
    return printed.getvalue()


def test_F28_random_numbers_follow_seed_step_and_rank_so_no_file_of_them_can_be_missing_or_foreign(tmp_path):
    """RNG file missing or of another world size: there is none; dropout after a resume draws what it would have drawn,
    wherever the generators stood; a rank draws the same among any number of ranks; another number of them is said."""
    import torch

    from launcher.trainer.randomness import rekey

    config = {**make.LLAMA, "attention_dropout": 0.2}
    recipe = make.make_recipe("ddp", config=config, checkpoint__rehearse=False)
    whole = make_run(tmp_path, recipe, {}, steps=7)
    cut = twin(whole, tmp_path / "cut")
    assert attempt_of([whole]) == [[None, None]]
    attempt = start(cut)
    run_ranks(rank_that_is_stopped, 2, str(cut.path), attempt, 2, "request")
    clear_stop(cut)
    (saved,) = valid_checkpoints(cut)
    assert {path.name for path in saved.path.iterdir()} == {
        "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json", "COMMITTED",
    }  # fmt: skip
    assert not {key for key in trainer_state(cut) if "rng" in key or "random" in key}
    attempt = start(cut)
    run_ranks(with_other_generators, 2, str(cut.path), attempt)
    assert losses(cut) == losses(whole)
    assert newest(cut) == newest(whole)

    data = whole.read_json("data.json")
    whole.data_file.write_text(json.dumps({**data, "total_steps": 8}))
    (said,) = run_ranks(what_a_rank_prints, 1, str(whole.path), start(whole))
    assert "2 ranks wrote this checkpoint, 1 go on from it" in said
    assert "keyed by seed, step and rank" in said

    def drawn(seed: int, step: int, rank: int) -> list[float]:
        rekey(seed, step, rank)
        return torch.rand(4).tolist()

    assert drawn(5, 3, 1) == drawn(5, 3, 1) != drawn(5, 3, 0) != drawn(5, 4, 0)


# F30: NaN on one rank


def test_F30_a_gradient_that_is_nan_on_one_rank_is_skipped_by_all_ranks_together_and_counted(tmp_path):
    """NaN gradient on one rank at step k: every strategy drops that update on all ranks, counts it, and goes on; the
    weights are those of a run that left the batch out."""
    runs = [make_run(tmp_path / kind, recipe_of(kind, train__on_nonfinite="skip", train__on_spike="skip"),
                     {3: TOO_LARGE}, steps=5) for kind in KINDS]  # fmt: skip
    left = twin(runs[0], tmp_path / "left")
    left.left_out_file.write_text('{"step": 3, "attempt": 1, "reason": "non_finite"}\n')
    assert attempt_of([*runs, left]) == [[None, None]] * 6
    for run in runs:
        assert [step for step, loss in losses(run).items() if loss is None] == [3]
        line = line_of(run, 3)
        assert (line["non_finite"], line["skipped"], line["steps_skipped"]) == (True, True, 1)
        state = trainer_state(run)
        assert (state["optimizer_step"], state["guards"]["skipped"]) == (4, 1)
        assert summarise(run)["guards"] == {"skipped": 1, "spikes": 0, "left_out": 0}
        close = {step: pytest.approx(loss, rel=1e-4) for step, loss in losses(runs[0]).items() if loss is not None}
        assert {step: loss for step, loss in losses(run).items() if loss is not None} == close
    assert line_of(left, 3)["left_out"] is True
    assert newest(left) == newest(runs[0])


def test_F30_after_so_many_in_a_row_the_run_goes_back_without_them_once_and_then_ends(tmp_path):
    """NaN in one step after the other: after train.max_skips of them all ranks go back to the checkpoint before the
    first, leave those batches out, and end at the next; both are logged, and no checkpoint holds a step of the row."""
    recipe = recipe_of(train__on_nonfinite="skip", train__max_skips=2, checkpoint__every_steps=1)
    run = make_run(tmp_path, recipe, dict.fromkeys((3, 4, 5), TOO_LARGE), steps=8)
    for name, text in attempt_of([run])[0]:
        assert name == "RollBack"
        assert "back to the last checkpoint, without them" in text
    assert {(o.failure_class, o.rolls_back) for o in read_outcomes(run, 1).values()} == {("non_finite", True)}
    assert valid_checkpoints(run)[-1].step == 2
    assert list(left_out(run)) == [3, 4]
    for name, text in attempt_of([run])[0]:
        assert name == "NonFiniteError"
        assert "step 5" in text
    assert {(o.failure_class, o.rolls_back) for o in read_outcomes(run, 2).values()} == {("non_finite", False)}
    assert list(left_out(run)) == [3, 4]
    assert summarise(run)["guards"]["left_out"] == 2


def test_F30_a_rolled_back_run_is_bit_equal_to_one_that_left_the_batch_out_from_the_beginning(tmp_path):
    """on_nonfinite=rollback: back to the last checkpoint, the batch left out, its records written down; the end is that
    of a run which never saw it, with a stop and a resume in between, too."""
    recipe = recipe_of("fsdp2", train__on_nonfinite="rollback", checkpoint__every_steps=2)
    run = make_run(tmp_path, recipe, {4: TOO_LARGE}, steps=8)
    never = twin(run, tmp_path / "never")
    (((name, _), _),) = attempt_of([run])
    assert name == "RollBack"
    written = left_out(run)[4]
    assert (written.attempt, written.reason, written.loss) == (1, "non_finite", None)
    shutil.copy(run.left_out_file, never.left_out_file)
    stopped = twin(never, tmp_path / "stopped")
    assert attempt_of([run, never]) == [[None, None]] * 2
    attempt = start(stopped)
    run_ranks(rank_that_is_stopped, 2, str(stopped.path), attempt, 2, "request")
    clear_stop(stopped)
    assert attempt_of([stopped]) == [[None, None]]
    for other in (run, stopped):
        assert losses(other) == losses(never)
        assert newest(other) == newest(never)
        assert trainer_state(other) == trainer_state(never)


class Spoil:
    """Makes one number of a live parameter of one rank infinite, as a flipped bit may."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def __call__(self, t: Any) -> None:
        if t.ranks.rank == self.rank and t.step + 1 == self.step:
            write_memory(next(p for p in t.engine.module.parameters() if p.dim() == 1), b"\x00\x00\x80\x7f", at=0)


def write_memory(tensor: Any, data: bytes, *, at: int) -> None:
    """Write into the memory of this live process behind torch's back."""
    memory = os.open("/proc/self/mem", os.O_RDWR)
    os.pwrite(memory, data, tensor.data_ptr() + at)
    os.close(memory)


def test_F30_the_launcher_goes_back_by_itself_and_finishes_without_the_poisoned_record(tmp_path):
    """A record whose weights make its loss infinite, on_nonfinite=rollback: one call of the launcher goes back within
    the job, leaves its batch out, and finishes; status tells of it."""
    recipe = project(
        tmp_path, train={"on_nonfinite": "rollback", "max_steps": 5}, checkpoint={"every_steps": 1, "rehearse": False}
    )
    chance = random.Random(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for record in range(40):  # two a row, so that each is in one of the steps
            ids = [chance.randrange(5, 300) for _ in range(60)]
            mask = [TOO_LARGE if record == 7 else 1.0] * 60
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    said = io.StringIO()
    loaded = load(recipe, ["data.num_workers=1"]).recipe
    assert launch(loaded, force=False, console=Console(said)) == 0, said.getvalue()
    run = run_of(recipe)
    assert [attempt.end_class for attempt in attempts(run)] == ["non_finite", "finished"]
    ((step, batch),) = left_out(run).items()
    assert batch.records is not None
    assert 7 in batch.records[str(tmp_path / "data.jsonl")]
    assert line_of(run, step)["left_out"] is True
    assert summarise(run)["guards"] == {"skipped": 0, "spikes": 0, "left_out": 1}
    shown = CliRunner().invoke(status.command, [str(run.path)], catch_exceptions=False).output
    assert "guards      1 global batch left out (left-out.jsonl)" in shown


def test_F30_a_stream_goes_on_behind_the_batch_that_is_left_out_and_shows_it_again(tmp_path):
    """NaN on one rank of streamed data, on_nonfinite=rollback: the lanes of all ranks go on behind the batch; its
    records are written down and its rows can be read again from the checkpoint before it."""
    from launcher.cli.preview import _of_run
    from launcher.data.preview import preview
    from launcher.data.tokenizer import TokenizerSpec, describe_tokenizer, load_tokenizer

    run = streaming_run(tmp_path, train__on_nonfinite="rollback", checkpoint__rehearse=False)
    data, words = run.read_json("data.json"), TokenizerSpec(str(tmp_path / "tokenizer"))
    known = {"tokenizer": describe_tokenizer(words, load_tokenizer(words)), "steps_per_epoch": None}
    run.data_file.write_text(json.dumps({**data, **known}))
    never = twin(run, tmp_path / "never")
    for name, text in attempt_of([run], fault=Spoil(1, 6))[0]:
        assert name == "RollBack"
        assert text.startswith("step 6: ")
    shutil.copy(run.left_out_file, never.left_out_file)
    written = left_out(run)[6].records or {}
    loaded, prepared, begin = _of_run(str(run.path), (), 6)
    assert begin[0] == 4
    shown = preview(loaded, prepared, rows=None, step=6, begin=begin)
    again: dict[str, set[int]] = {}
    for document in (document for row in shown["rows"] for document in row["documents"]):
        again.setdefault(document["source"], set()).add(document["record"])
    assert {source: sorted(records) for source, records in again.items()} == written
    assert written
    assert attempt_of([run, never]) == [[None, None]] * 2
    assert losses(run) == losses(never)
    assert newest(run) == newest(never)


# F31: a spike of the loss

SPIKE = {"train__spike_window": 8, "train__spike_sigmas": 4.0}


def test_F31_a_poisoned_batch_takes_the_run_back_and_its_records_can_be_looked_at(tmp_path):
    """Loss spike by a poisoned batch, on_spike=rollback: the run goes back to its last checkpoint, the ids of the batch
    are written down, its rows can be shown again, and it is left out."""
    recipe = recipe_of(train__on_spike="rollback", checkpoint__every_steps=5, **SPIKE)
    poisoned = data_with(tmp_path, recipe, {12: HEAVY}, steps=14)[12]
    run = make.make_run(tmp_path, recipe, total_steps=14, evaluation=False)
    for name, text in attempt_of([run])[0]:
        assert name == "RollBack"
        assert text.startswith("step 12: loss ")
    assert {(o.failure_class, o.rolls_back) for o in read_outcomes(run, 1).values()} == {("non_finite", True)}
    (written,) = left_out(run).values()
    assert (written.step, written.reason) == (12, "spike")
    assert written.loss is not None
    assert written.limit is not None
    assert written.loss > written.limit
    assert poisoned in (written.records or {})["made.jsonl"]
    assert valid_checkpoints(run)[-1].step == 10
    from launcher.data.mix import Mix

    mix = Mix.open(run.read_json("data.json")["train"])
    rows = mix.global_batch(11, seed=recipe.train.seed, global_batch_size=recipe.train.global_batch_size)
    shown = {document.record: document for row in rows.tolist() for document in mix.documents(row)}
    assert sorted(shown) == (written.records or {})["made.jsonl"]
    assert shown[poisoned].weights.max() == HEAVY
    assert attempt_of([run]) == [[None, None]]
    assert line_of(run, 12)["left_out"] is True
    assert max(loss for step, loss in losses(run).items() if step > 10 and loss is not None) < written.limit


def test_F31_every_strategy_drops_the_update_of_the_spike_itself_and_a_resume_decides_alike(tmp_path):
    """on_spike=skip: the update of the very step is dropped on every rank, whatever the strategy; a run that was
    stopped and resumed is bit-equal to one that was not."""
    runs = [make_run(tmp_path / kind, recipe_of(kind, train__on_spike="skip", **SPIKE), {12: HEAVY}, steps=14)
            for kind in KINDS]  # fmt: skip
    stopped, left = twin(runs[0], tmp_path / "stopped"), twin(runs[0], tmp_path / "left")
    left.left_out_file.write_text('{"step": 12, "attempt": 1, "reason": "spike"}\n')
    assert attempt_of([*runs, left]) == [[None, None]] * 6
    for run in runs:
        line = line_of(run, 12)
        assert (line["spike"], line["skipped"], line["steps_skipped"], line["loss_spikes"]) == (True, True, 1, 1)
        assert trainer_state(run)["optimizer_step"] == 13
        assert all(math.isfinite(loss or math.nan) for loss in losses(run).values())
    assert newest(left) == newest(runs[0])
    attempt = start(stopped)
    run_ranks(rank_that_is_stopped, 2, str(stopped.path), attempt, 8, "request")
    clear_stop(stopped)
    assert attempt_of([stopped]) == [[None, None]]
    assert losses(stopped) == losses(runs[0])
    assert newest(stopped) == newest(runs[0])
    assert trainer_state(stopped) == trainer_state(runs[0])


# F32: flipped bits


class Flip:
    """Flips one bit in the memory of one rank's live parameter (or reduced gradient), by the file of its memory."""

    def __init__(self, rank: int, step: int, *, what: str = "weight") -> None:
        self.rank, self.step, self.what = rank, step, what

    def __call__(self, t: Any) -> None:
        if t.ranks.rank != self.rank or t.step + 1 != self.step:
            return
        parameter = next(p for p in t.engine.module.parameters() if p.numel() > 1)
        if self.what == "weight":
            self.flip(parameter)
        else:  # behind the reduction, before the update
            original = t.engine.optimizer.step
            t.engine.optimizer.step = lambda: (self.flip(parameter.grad), original())[1]

    def flip(self, tensor: Any) -> None:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        at = 4 * 5 + 2  # a byte with the last bit of the sixth number's exponent
        byte = ctypes.string_at(local.data_ptr() + at, 1)[0]
        write_memory(local, bytes([byte ^ 0x80]), at=at)


def test_F32_a_flipped_bit_is_found_within_the_period_the_rank_is_named_and_no_checkpoint_holds_it(tmp_path):
    """Bit flip in one rank's weights between steps: the comparison of the replicas finds it within
    train.replica_check_steps, or before the next checkpoint is written, names the rank by majority, and the run goes on
    from the last checkpoint to the end of an undisturbed one."""
    recipe = recipe_of(train__replica_check_steps=3, checkpoint__every_steps=4, train__global_batch_size=6)
    run = make_run(tmp_path, recipe, {}, steps=10)
    before, whole = twin(run, tmp_path / "before"), twin(run, tmp_path / "whole")
    (((name, text), *others),) = attempt_of([run], ranks=3, fault=Flip(1, 5))
    assert name == "ReplicaError"
    assert {said for _, said in others} == {text}
    assert text.startswith("after step 5: rank 1 on ")
    assert "than the other 2 ranks, first in model.embed_tokens.weight" in text
    assert {(o.failure_class, o.rolls_back) for o in read_outcomes(run, 1).values()} == {("unknown", True)}
    assert valid_checkpoints(run)[-1].step == 4
    (((_, text), *_),) = attempt_of([before], ranks=3, fault=Flip(2, 7))  # steps 6 and 9 are due, the save of 8 before
    assert text.startswith("after step 8: rank 2 on ")
    assert valid_checkpoints(before)[-1].step == 4
    assert attempt_of([run, before, whole], ranks=3) == [[None] * 3] * 3
    for one in (run, before):
        assert {step: loss for step, loss in losses(one).items() if step > 4} == {
            step: loss for step, loss in losses(whole).items() if step > 4
        }
        assert newest(one) == newest(whole)


def test_F32_every_strategy_with_copies_finds_it_and_two_ranks_are_both_named(tmp_path):
    """Bit flip with two ranks, in a reduced gradient, with ZeRO-1 and 2, and between the copies of HSDP: found; where
    no majority is, both are named and no one is accused."""
    weight, gradient = Flip(1, 4), Flip(0, 3, what="gradient")
    keys = {"train__replica_check_steps": 2, "train__global_batch_size": 4}
    kinds = [("ddp", weight), ("zero1", weight), ("zero2", weight), ("ddp", gradient)]
    for fault in (weight, gradient):
        runs = [make_run(tmp_path / f"{kind}-{fault.what}", recipe_of(kind, **keys), {}, steps=6)
                for kind, how in kinds if how is fault]  # fmt: skip
        for (name, text), *_ in attempt_of(runs, fault=fault):
            assert name == "ReplicaError"
            assert text.startswith("after step 3: rank 0 on ")
            assert "no majority says which" in text
    hsdp = make_run(tmp_path / "hsdp", recipe_of("fsdp2", strategy__replicate=2, **keys), {}, steps=6)
    for name, text in attempt_of([hsdp], ranks=4, fault=weight)[0]:
        assert name == "ReplicaError"
        assert text.startswith("after step 3: rank 1 on ")
        assert " and rank 3 on " in text
