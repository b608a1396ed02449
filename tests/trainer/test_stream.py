"""Streamed data on real ranks: killed, stopped and resumed, on other numbers of ranks; what the ranks agree on."""

from __future__ import annotations

import contextlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.stream import Lanes, look
from launcher.data.tokenizer import TokenizerSpec, describe_tokenizer, load_tokenizer
from launcher.recipe.schema import Source, from_dict, to_dict
from launcher.run.control import clear_stop, read_outcomes, request_stop
from launcher.run.data import VERSION
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.trainer.checkpoint.lanes import read_lanes
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from launcher.trainer.metrics import read_metrics
from launcher.trainer.stream import StreamBatches
from tests.data.make import tiny_tokenizer, write_jsonl
from tests.ranks import run_ranks
from tests.trainer import make

pytestmark = pytest.mark.gloo
STEPS, LANES = 9, 12


def streaming_run(folder: Path, **changes: Any) -> RunDirectory:
    """A run directory of a weighted mix of two streams, as the launch side and `prepare` would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny_tokenizer(folder / "tokenizer")
    a = write_jsonl(folder / "a.jsonl", [{"text": f"{i} upon a time " * (1 + i % 5)} for i in range(150)])
    b = write_jsonl(folder / "b.jsonl", [{"prompt": f"who are you {i}?", "completion": f"I am {i}"} for i in range(40)])
    config = {**make.LLAMA, "vocab_size": 400}
    usual: dict[str, Any] = {
        "model__tokenizer": str(words), "train__global_batch_size": LANES, "train__micro_batch_size": 2,
        "train__max_steps": STEPS, "data__streaming": True, "data__shuffle_buffer": 36, "data__overlong": "split",
        "data__train": [Source(path=str(a), weight=3.0), Source(path=str(b), weight=1.0)],
        "checkpoint__every_steps": 4, "cluster__preflight": False,
    }  # fmt: skip
    recipe = make.make_recipe("ddp", config=config, **{**usual, **changes})
    run = RunDirectory(folder / "run")
    run.create(to_dict(recipe), {}, {})
    spec = TokenizerSpec(str(words))
    train = look(recipe, tokenizer=describe_tokenizer(spec, load_tokenizer(spec)), model_vocab_size=400)
    data = {
        "version": VERSION, "train": train, "eval": None, "leaked": {}, "vocab_size": 400, "total_rows": None,
        "global_batch_size": LANES, "total_steps": STEPS,
    }  # fmt: skip
    run.data_file.write_text(json.dumps(data))
    return run


def rank_of_stream(rank: int, world_size: int, path: str, attempt: int, how: str, at: int) -> list[str] | None:
    """Run a rank, killed or asked to stop at step `at`; notes in a file what it was given, tells what it raised."""
    from launcher.trainer import loop
    from launcher.trainer.main import run_rank

    accumulate, step = loop.accumulate, StreamBatches.step

    def noted(self: Any, number: int) -> Any:
        batch = step(self, number)
        found = [[m.rows, m.documents] for m in batch.micro]
        with open(f"{path}/seen-{attempt}-{rank}", "a") as file:
            file.write(json.dumps([number, found, batch.weight, batch.source_tokens]) + "\n")
        return batch

    def hooked(t: Any, rows: Any) -> Any:
        if t.step == at and how == "killed":
            t.saver._manager.wait()
            os._exit(9)
        if t.step == at and how == "stopped" and rank == 0:
            request_stop(RunDirectory(path), "test")
        return accumulate(t, rows)

    loop.accumulate, StreamBatches.step = hooked, noted  # type: ignore[assignment, method-assign]
    try:
        run_rank(path, attempt)
    except Exception as error:
        return [type(error).__name__, str(error)]
    finally:
        loop.accumulate, StreamBatches.step = accumulate, step  # type: ignore[method-assign]
    return None


def attempt(run: RunDirectory, ranks: int, how: str = "", at: int = -1) -> dict[int, Any]:
    """One attempt; the outcome of each rank that told one."""
    number = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    with pytest.raises(RuntimeError, match="died") if how == "killed" else contextlib.nullcontext():
        run_ranks(rank_of_stream, ranks, str(run.path), number, how, at)
    clear_stop(run)
    return {rank: (o.kind, o.step) for rank, o in read_outcomes(run, number).items()}


def losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


def seen(run: RunDirectory) -> dict[int, tuple[dict[int, list[int]], float, list[int]]]:
    """Step -> (lane's row number -> nothing, documents by row), weight, tokens of sources; later attempts count."""
    found: dict[int, Any] = {}
    paths = sorted(run.path.glob("seen-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in paths:
        for line in path.read_text().splitlines():
            step, micro, weight, tokens = json.loads(line)
            number = int(path.name.split("-")[1])
            if step not in found or found[step][0] != number:
                found[step] = (number, {}, weight, tokens)
            for rows, documents in micro:
                found[step][1][tuple(rows)] = documents
    return {step: (rows, weight, tokens) for step, (_, rows, weight, tokens) in found.items() if step < STEPS}


def content(run: RunDirectory) -> dict[str, bytes]:
    """Weights, moments and lanes of the newest checkpoint."""
    folder = valid_checkpoints(run)[-1].path
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    state = {f"{n} {k}": reader.read(n, k).numpy().tobytes() for n in manifest["params"] for k in manifest["kinds"]}
    lanes = read_lanes(folder, manifest, range(LANES))
    return state | {f"{lane} {name}": a.tobytes() for lane, arrays in lanes.items() for name, a in arrays.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = streaming_run(tmp_path_factory.mktemp("whole"))
    assert attempt(run, 2) == {0: ("finished", STEPS), 1: ("finished", STEPS)}
    return run


def test_l4_a_stream_killed_stopped_and_resumed_gives_the_same_samples_losses_weights_and_moments_bit_for_bit(
    whole: RunDirectory, tmp_path: Path
) -> None:
    run = streaming_run(tmp_path)
    attempt(run, 2, "killed", 5)
    assert [c.step for c in valid_checkpoints(run)] == [4]
    assert attempt(run, 2, "stopped", 5) == {0: ("stopped", 7), 1: ("stopped", 7)}
    assert attempt(run, 2) == {0: ("finished", STEPS), 1: ("finished", STEPS)}
    assert losses(run) == losses(whole)
    assert seen(run) == seen(whole)
    theirs, ours = content(whole), content(run)
    assert ours.keys() == theirs.keys()
    words = [key for key in ours if key.endswith(" words")]  # names files, which lie elsewhere
    assert [key for key in ours if key not in words and ours[key] != theirs[key]] == []


def test_l5_a_stream_goes_on_over_other_numbers_of_ranks_with_the_same_samples_in_the_same_places(
    whole: RunDirectory, tmp_path: Path
) -> None:
    run = streaming_run(tmp_path, train__micro_batch_size=1)
    for ranks, stop in ((1, 1), (3, 4), (4, 99)):
        kinds = {kind for kind, _ in attempt(run, ranks, "stopped", stop).values()}
        assert kinds == {"stopped" if stop < STEPS else "finished"}
    for step, loss in losses(whole).items():
        assert losses(run)[step] == pytest.approx(loss, rel=1e-5)
    for step, (rows, weight, tokens) in seen(whole).items():
        there, their_weight, their_tokens = seen(run)[step]
        assert sorted(number for numbers in rows for number in numbers) == list(range(step * LANES, (step + 1) * LANES))
        assert (their_weight, their_tokens) == (weight, tokens)
        for numbers, documents in rows.items():
            assert [d for n in numbers for d in there[n,]] == documents
    tokens = np.sum([tokens for _, _, tokens in seen(whole).values()], axis=0)
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.05)


def test_what_is_lost_is_told_when_it_doubles_and_a_save_takes_the_state_of_its_own_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = streaming_run(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "" if i % 9 == 4 else f"{i} upon a time"} for i in range(150)])
    recipe, entry = from_dict(run.read_recipe()), run.read_json("data.json")["train"]

    def lanes() -> Lanes:
        return Lanes(recipe, entry, rank=0, ranks=1)

    batches = StreamBatches(lanes(), global_batch_size=LANES, micro_batch_size=2, ranks=1, first=0, last=4)
    steps = [batches.step(step) for step in range(4)]
    assert [sum(batch.source_tokens) == batch.tokens for batch in steps] == [True] * 4
    assert [batch.weight for batch in steps] == [sum(float(m.weights.sum()) for m in batch.micro) for batch in steps]
    said = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    assert said
    assert all("(empty; the first is " in line and "a.jsonl: line " in line for line in said)
    counts = [int(line.split("dropped: ")[1].split()[0].replace(",", "")) for line in said]
    assert all(later > earlier for earlier, later in pairwise(counts))
    again = lanes()
    for _ in range(3):
        again.rows()
    ours = batches.behind(3)()
    for number, state in again.state().items():
        for name, array in state.arrays().items():
            assert ours[number][name].tobytes() == array.tobytes()


def rank_that_waits(rank: int, world_size: int, path: str) -> list[str]:
    """Rank 0 prepares a batch that rank 1 never comes to, and gives up; then both go, whatever waits."""
    import threading
    import time

    from launcher.trainer import objectives
    from launcher.trainer.checkpoint.manager import CheckpointManager
    from launcher.trainer.distributed import Ranks
    from launcher.trainer.rows import Prefetch
    from launcher.trainer.stream import open_stream

    run = RunDirectory(path)
    recipe, entry = from_dict(run.read_recipe()), run.read_json("data.json")["train"]
    manager = CheckpointManager(run, attempt=1, rank=rank, world_size=2, meta={"run_id": "x"})
    batches = open_stream(recipe, entry, manager, ranks=Ranks.from_environment(), first=0, last=9)
    if rank == 1:
        return []
    rows = Prefetch(batches, objectives.get("sft"), backend="sdpa", device=make.CPU, first=0, last=9)
    threading.Timer(0.3, lambda: rows.close(failed=True)).start()
    began = time.monotonic()
    try:
        rows.take(0)
    except Exception as error:
        return [type(error).__name__, str(error), "soon" if time.monotonic() - began < 60 else "late"]
    return []


def test_a_rank_that_ends_does_not_wait_for_the_others_part_of_a_batch(tmp_path: Path) -> None:
    run = streaming_run(tmp_path)
    found, _ = run_ranks(rank_that_waits, 2, str(run.path))
    assert found == ["ConnectionError", "this rank is ending", "soon"]


def test_a_bad_record_on_one_rank_ends_all_with_its_file_and_line(tmp_path: Path) -> None:
    run = streaming_run(tmp_path)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"title": "words"}\n')
    number = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    for told in run_ranks(rank_of_stream, 3, str(run.path), number, "", -1):
        assert told is not None
        assert told[0] == "DataError"
        assert "a.jsonl: line 151 (byte " in told[1]
        assert "column text" in told[1]
    assert {o.failure_class for o in read_outcomes(run, number).values()} == {"data"}
