"""L8: one builder a store, outside any collective; a killed one is succeeded and its finished shards are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.data.store import Store
from tests.data.make import tiny_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# a process that prepares the recipe in argv[1], with shards small enough to be interrupted between two of them
SCRIPT = """
import json, sys, time
from launcher.data import parts
from launcher.data.prepare import prepare
from launcher.recipe.schema import from_dict

parts.SHARD_BYTES = 3000
pause = float(sys.argv[2])
def progress(what, done, total):
    print(what, done, total, file=sys.stderr, flush=True)
    if what.startswith("tokenising") and 0 < done < total:
        time.sleep(pause)
prepared = prepare(from_dict(json.load(open(sys.argv[1]))), progress=progress)
print(json.dumps({"built": prepared.built, **prepared.to_dict()}))
"""


@pytest.fixture
def recipe(tmp_path):
    records = [{"prompt": f"Question {i}? ", "completion": f"The answer is {i}."} for i in range(600)]
    values = {
        "model": {
            "config": {"model_type": "llama", "vocab_size": 400},
            "tokenizer": str(tiny_tokenizer(tmp_path / "tokenizer")),
        },
        "data": {
            "train": [{"path": str(write_jsonl(tmp_path / "train.jsonl", records))}], "seq_len": 64, "num_workers": 1,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"global_batch_size": 4, "max_steps": 3},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    return tmp_path / "recipe.json"


@pytest.fixture
def start(recipe):
    """start(pause) -> a process that prepares; none outlives the test."""
    started = []

    def start(pause=0.0):
        command = [sys.executable, "-c", SCRIPT, str(recipe), str(pause)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out), err


def shards(cache):
    """inode of each shard's tokens file, by name of the shard."""
    return {p.parent.name: p.stat().st_ino for p in Path(cache).glob("tokens/*/part-*/tokens.npy")}


def test_l8_four_processes_on_a_cold_store_cause_exactly_one_build(start):
    results = [finish(process) for process in [start() for _ in range(4)]]
    assert sum(result["built"] for result, _ in results) == 1
    tokenised = [err for _, err in results if "tokenising" in err]
    assert len(tokenised) == 1
    assert len({json.dumps({**result, "built": None}) for result, _ in results}) == 1


def test_l8_a_waiter_takes_over_from_a_killed_builder_and_keeps_its_finished_shards(start, tmp_path):
    builder = start(pause=600)
    for line in builder.stderr:
        if line.startswith("tokenising") and line.split()[2] == "1":
            break
    before = shards(tmp_path / "cache")
    assert before
    waiter = start()
    for line in waiter.stderr:
        if line.startswith("waiting for process"):
            break
    assert f"process {builder.pid} on" in line
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    result, _ = finish(waiter)
    assert result["built"]
    after = shards(tmp_path / "cache")
    assert len(after) > len(before)
    assert before.items() <= after.items()
    assert sorted(Store.open(result["train"]["sources"][0]["store"]).manifest["parts"])[0].endswith("part-00000")
    assert result["train"]["documents"] == 600
    assert not list((tmp_path / "cache").glob("tokens/.*"))


def test_l8_workers_of_a_killed_builder_end_with_it(recipe, start):
    values = json.loads(recipe.read_text())
    values["data"]["num_workers"] = 2
    recipe.write_text(json.dumps(values))
    builder = start(pause=600)
    for line in builder.stderr:
        if line.startswith("tokenising") and line.split()[2] == "1":
            break
    workers = children(builder.pid)
    assert len(workers) == 2
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(folder.name))
    return found


def alive(pid):
    """Whether the process runs; one that ended and is not yet reaped does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
